from collections.abc import Mapping, Sequence

DIFFERENCES: Mapping[int, str]
BASE: int
CODE: int
CODE_SIZE: int
DATA: int
DATA_PAGES: int
END: int
END16: int
SIZE: int
BACK: int
BACK_END: int

def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]: ...

class Fuzzer:
    def __init__(
        self,
        vcpu: object,
        addresses: tuple[int, int, int],
        ram: int,
        ram_size: int,
        code_pages: Sequence[int],
        data_pages: Sequence[int],
        end_page: int,
        kernel: int,
        stubs: int,
        stack_top: int,
        xcr0: int,
        xs_size: int,
        xs_512: int,
        initial: int,
        progress: int,
    ) -> None: ...
    def seal(self) -> None: ...
    def unseal(self) -> None: ...
    @staticmethod
    def page_kind(page: int) -> int: ...
    def ldt(self, entry: int, base: int, limit: int, flags: int) -> None: ...
    def poke_native(self, at: int, data: bytes) -> None: ...
    def poke_guest(self, at: int, data: bytes) -> None: ...
    def configure(
        self,
        bits: int,
        selectors: Sequence[int],
        cs: int,
        cs_base: int,
        seg_base: Sequence[int],
        fs_base: int,
        gs_base: int,
        *,
        undefined: bytes,
        evex: bool = False,
        max_insns: int = 6,
        faults: int = 6,
        invalid: int = 10,
        branches: bool = True,
    ) -> None: ...
    def batch(self, seed: int, sequences: int = 256, states: int = 4) -> int: ...
    def forget(self) -> None: ...
    def counts(self) -> tuple[int, int, int]: ...
    def vector_counts(self) -> dict[int, int]: ...
    def coverage(self) -> dict[tuple[int, int, int, int], int]: ...
    def sequence(self, n: int) -> tuple[int, bytes, list[int], int]: ...
    def differences(self) -> list[tuple[int, int, int, dict[str, int], dict[str, int], dict[str, int]]]: ...
    def replay(self, seed: int, sequence: int, state: int, sequences: int = 256, states: int = 4) -> bytes: ...
    def run_one(
        self,
        at: int,
        code: bytes,
        start: Mapping[str, int],
        xsave: bytes,
        env: Sequence[tuple[int, int]] = (),
        und: Sequence[int] = (),
        times: int = 1,
    ) -> tuple[int, dict[str, int], dict[str, int], bytes, bytes, list[tuple[int, bytes, bytes]]]: ...
    def undefined_of(self, n: int) -> list[int]: ...
    def env_of(self, n: int) -> list[tuple[int, int]]: ...
