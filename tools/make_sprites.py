"""Make realign_nb/assets/sprites.png again from the Noto Color Emoji font (Debian: fonts-noto-color-emoji).

    python tools/make_sprites.py path/to/NotoColorEmoji.ttf
"""
import sys

from PIL import Image, ImageDraw, ImageFont

from common import LIB

EMOJI = "🐕 🐈 🐦 🐎 🚗 🚌 🚚 🚲 🏍 ⛵ ☂ 🪁 ⚽ 🥏 🪑 🪴 🍕 🎂 🍩 🍌 🍎 ☕ 🍾 🥄 🔪 💻 ⌨ 🖱 📕 ⏰ 📱 📺 🛋 🧸 🎒 🚦".split()   # in the order of world.KINDS


def main(font_file):
    font, sheet = ImageFont.truetype(font_file, 109), Image.new("RGBA", (384, 384), (0, 0, 0, 0))
    for i, glyph in enumerate(EMOJI):
        im = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(im).text((10, 10), glyph, font=font, embedded_color=True)
        im = im.crop(im.getbbox()); side = max(im.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(im, ((side - im.width) // 2, (side - im.height) // 2))
        sheet.paste(square.resize((64, 64), Image.LANCZOS), (i % 6 * 64, i // 6 * 64))
    sheet.save(LIB / "assets" / "sprites.png", optimize=True)


if __name__ == "__main__": main(*sys.argv[1:])
