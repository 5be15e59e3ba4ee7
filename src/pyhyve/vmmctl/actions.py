"""What a running VM can be asked from the command line, and how the answer is shown."""

import json
from collections.abc import Mapping

from pyhyve.base.errors import UsageError
from pyhyve.base.output import table
from pyhyve.base.parser import did_you_mean
from pyhyve.libvmm.client import Client

EXPLAINED = ("irq", "vector", "nmi")


def number(text: str, option: str) -> int:
    """Return a number, decimal or 0x and hexadecimal. UsageError, beginning with `option`, for anything else."""
    try:
        value = int(text, 0) if len(text) < 20 else -1
    except ValueError:
        value = -1
    if value < 0:
        raise UsageError(f"{option} {text[:40]}: not a number; write it like 4 or 0x31")
    return value


def explain(client: Client, what: str, which: int | None, cpu: int | None, as_json: bool) -> str:
    """Return why an interrupt is not delivered: `what` is a word of EXPLAINED, `which` its number (None for nmi)."""
    if what not in EXPLAINED:
        raise UsageError(f"explain {what}: there are {', '.join(EXPLAINED)}{did_you_mean(what, EXPLAINED)}")
    if (what == "nmi") != (which is None):
        raise UsageError(f"explain {what}: {'it has no number' if what == 'nmi' else 'which one? add its number'}")
    explanation = client.explain(
        irq=which if what == "irq" else None, vector=which if what == "vector" else None, nmi=what == "nmi", vcpu=cpu
    )
    return _json(explanation.as_json()) if as_json else str(explanation)


def statistics(client: Client, as_json: bool) -> str:
    figures = client.statistics()
    return _json(figures) if as_json else table(figures)


def latency(client: Client, as_json: bool) -> str:
    document = client.interrupt_latency()
    text = str(document.pop("text", ""))
    return _json(document) if as_json else text


def describe(client: Client, as_json: bool) -> str:
    description = client.describe()
    fields = {name: getattr(description, name) for name in description.__slots__}
    return (
        _json(fields)
        if as_json
        else "\n".join(
            f"{name.replace('_', ' '):<12}{value if value is not None else '-'}" for name, value in fields.items()
        )
    )


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2)
