"""The binary of lrc, a compressor of Hugging Face checkpoints: `python -m lrc` runs it."""

import os
import sys
import sysconfig


def find_binary():
    """The path of the binary that came with this package.

    It is among the scripts of the environment, or of the user's own packages.
    """
    name = "lrc" + (sysconfig.get_config_var("EXE") or "")
    schemes = [None, "nt_user" if os.name == "nt" else "posix_user"]
    folders = [sysconfig.get_path("scripts", scheme) if scheme else sysconfig.get_path("scripts") for scheme in schemes]
    # `pip install --target FOLDER` puts scripts into FOLDER/bin.
    folders.append(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bin"))
    for folder in folders:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"no `{name}` in {', '.join(folders)}; `pip install --force-reinstall lrc` puts it there")


def main():
    """Runs the binary with the arguments of this process, and ends with its exit code."""
    binary = find_binary()
    arguments = [binary, *sys.argv[1:]]
    if os.name != "nt":
        os.execv(binary, arguments)
    import subprocess

    sys.exit(subprocess.run(arguments).returncode)
