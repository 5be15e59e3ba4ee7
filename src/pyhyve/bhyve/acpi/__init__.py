"""ACPI: the tables by which a guest learns what the machine has."""

from pyhyve.bhyve.acpi.tables import build_acpi

__all__ = ["build_acpi"]
