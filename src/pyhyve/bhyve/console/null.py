"""Nobody listens and nobody types."""

from pyhyve.bhyve.console.base import OnInput, OnQuit


class NullConsole:
    def write(self, data: bytes) -> None:
        pass

    def start(self, on_input: OnInput, on_quit: OnQuit) -> None:
        pass

    def stop(self) -> None:
        pass
