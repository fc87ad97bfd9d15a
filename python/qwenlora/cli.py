"""The programs `qwenlora` and `qwenlora-keys`: arguments in, exit status out."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["keys_main", "main"]

_USAGE = """\
usage: qwenlora keys FILE... [options]  what LoRA files contain, what is applied
       qwenlora merge FILE[:STRENGTH]... -o FILE
                                        several LoRA files to one plain LoRA
       qwenlora map FILE[:STRENGTH]... [-o PICTURE]
                                        where LoRA files act, and how strongly
       qwenlora norms CHECKPOINT [-o FILE]
                                        exact norms of a 16-bit model's weights,
                                        for DoRA
       qwenlora doctor [--help]         what is installed, what cannot work, and
                                        how to mend it
       qwenlora demo [--light] [--keep DIR]
                                        compose LoRAs into an emulated model and
                                        measure the error
       qwenlora --version
"""
_EXIT_USAGE = 64


def main(args: Sequence[str] | None = None) -> int:
    """Run `qwenlora` with these arguments, by default the process's own."""
    args = list(sys.argv[1:] if args is None else args)
    command = args[0] if args else None
    if command == "keys":
        return keys_main(args[1:])
    if command == "doctor":
        from qwenlora.doctor import main as doctor

        return doctor(args[1:])
    if command == "merge":
        from qwenlora.merge import main as merge

        return merge(args[1:])
    if command == "map":
        from qwenlora.map import main as map_

        return map_(args[1:])
    if command == "norms":
        from qwenlora.norms import main as norms

        return norms(args[1:])
    if command == "demo":
        from qwenlora.demo import main as demo

        return demo(args[1:])
    if command == "--version":
        from qwenlora import __version__

        sys.stdout.write(f"qwenlora {__version__}\n")
        return 0
    stream = sys.stdout if command in ("-h", "--help", "help") else sys.stderr
    stream.write(_USAGE)
    return 0 if stream is sys.stdout else _EXIT_USAGE


def keys_main(args: Sequence[str] | None = None) -> int:
    """Run `qwenlora-keys` with these arguments, by default the process's own."""
    # Rust runs without the interpreter: Ctrl-C must end the process by itself.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout.flush()
    args = list(sys.argv[1:] if args is None else args)
    if "--map" in args:
        from qwenlora.map.keys import keys_with_map

        return keys_with_map(args, _run_keys)
    return _run_keys(args)


def _run_keys(args: list[str]) -> int:
    from qwenlora import _core

    return _core.run_keys(args)
