"""The four source folders are one package, and pyproject.toml says so completely."""

import sys
import tomllib
from pathlib import Path

import attnopt.backends
import attnopt.cli
import attnopt.passes

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = CONFIG["tool"]["setuptools"]
FOLDERS = ("passes", "backends", "cli")


def packages_on_disk() -> set[str]:
    roots = {name: ROOT / path for name, path in SETUPTOOLS["package-dir"].items()}
    return {
        ".".join([name, *init.parent.relative_to(root).parts])
        for name, root in roots.items()
        for init in root.glob("**/__init__.py")
        if not init.parent.is_symlink()
    }


def test_pyproject_lists_every_package():
    assert set(SETUPTOOLS["packages"]) == packages_on_disk()


def test_every_folder_of_modules_is_a_package():
    roots = [ROOT / path for path in SETUPTOOLS["package-dir"].values()]
    folders = {file.parent for root in roots for file in root.glob("**/*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_no_folder_was_imported_under_a_second_name():
    assert attnopt.passes.__name__ == "attnopt.passes"
    assert not set(FOLDERS) & set(sys.modules)


def test_links_inside_the_package_lead_to_the_folders():
    for name in FOLDERS:
        assert (ROOT / "attnopt" / name).resolve() == ROOT / name


def test_no_module_is_named_like_a_library_it_would_hide():
    taken = {"onnx", "onnxruntime", "torch", "transformers", "triton"}
    assert not taken & {file.stem for file in (ROOT / "backends").iterdir()}


def test_the_two_onnxruntimes_never_meet():
    extra = CONFIG["project"]["optional-dependencies"]["onnx"]
    gpu, cpu = (line.split("; ")[1] for line in extra if line.startswith("onnxruntime"))
    assert gpu == "sys_platform == 'linux' and platform_machine == 'x86_64'"
    assert cpu == "sys_platform != 'linux' or platform_machine != 'x86_64'"
