"""All settings are in settings.ini; edit there, not here."""
import shlex
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

for key in "lib_name lib_path version description keywords author author_email license min_python status audience language git_url".split():
    assert key in cfg, f"settings.ini has no '{key}': add it"

licenses = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}
statuses = ["0", "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]
# every NAME_requirements key becomes the extra NAME: cpu, gpu, offline, dev
extras = {key.removesuffix("_requirements"): shlex.split(value) for key, value in cfg.items() if key.endswith("_requirements")}
readme = here / "README.md"
package = here / cfg["lib_path"]
# sprites and the tiny checkpoint under assets/, the paper's runs as files under recipes/, at any depth
assets = [str(f.relative_to(package)) for folder in ("assets", "recipes") for f in sorted((package / folder).rglob("*"))
          if f.is_file() and f.suffix != ".pyc" and "__pycache__" not in f.parts]

setuptools.setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license=licenses.get(cfg["license"], cfg["license"]),
    url=cfg["git_url"], python_requires=">=" + cfg["min_python"],
    classifiers=["Development Status :: " + statuses[int(cfg["status"])],
                 "Intended Audience :: " + cfg["audience"],
                 "Natural Language :: " + cfg["language"],
                 "Programming Language :: Python :: 3"],
    packages=setuptools.find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"],
                                      exclude=[cfg["lib_path"] + "." + folder + end for folder in ("assets", "recipes") for end in ("", ".*")]),
    package_data={cfg["lib_path"]: assets},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    entry_points={"console_scripts": shlex.split(cfg.get("console_scripts", "")),
                  # lets other nbdev projects link to these docs
                  "nbdev": [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d']},
)
