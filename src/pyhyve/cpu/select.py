"""Finding a processor by name. Engines are imported only when asked for."""

from importlib import import_module
from typing import Final, cast

from pyhyve.base.errors import HostError, UsageError
from pyhyve.cpu.processor import DEFAULT_CODE_CACHE, CachesCode, Processor

ENGINES: Final = {"bt": "pyhyve.cpu.bt.engine", "kvm": "pyhyve.cpu.kvm.engine"}


def processor(name: str = "auto", code_cache: int = DEFAULT_CODE_CACHE) -> Processor:
    """Return the engine called `name` ("bt", "kvm"); "auto" is the software processor, which runs everywhere.
    `code_cache` is for engines that translate.

    Raises UsageError for an unknown name, HostError where the host cannot run that engine.
    """
    if name == "auto":
        name = "bt"
    if name not in ENGINES:
        raise UsageError(f"--processor {name}: unknown processor; there are auto, {', '.join(sorted(ENGINES))}")
    engine = cast(Processor, import_module(ENGINES[name]).Engine())
    reason = engine.unavailable()
    if reason is not None:
        raise HostError(f"--processor {name}: {reason}")
    if isinstance(engine, CachesCode):
        engine.code_cache = code_cache
    return engine
