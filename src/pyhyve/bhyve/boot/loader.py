"""What `--kernel` names: the kind of image is found out, and its loader called."""

from typing import Final

from pyhyve.base.errors import UsageError
from pyhyve.base.protocols import GuestMemory
from pyhyve.bhyve.boot import bzimage, elf, multiboot
from pyhyve.bhyve.boot.files import BootFiles, ModuleFile, read_file
from pyhyve.bhyve.boot.linux import load_linux
from pyhyve.bhyve.boot.placing import KERNEL_FILE_MAX
from pyhyve.bhyve.boot.pvh import load_pvh
from pyhyve.bhyve.boot.state import BootState

LINUX_APPEND: Final = "console=ttyS0"
"""A kernel's command line where none is given; a Multiboot image is then given none."""


def load_kernel(memory: GuestMemory, files: BootFiles, low_ram: int, high_ram: int, *, rsdp: int) -> BootState:
    """Place the kernel with all it is handed into `memory`; return the state in which its first processor starts.

    A bzImage goes to Linux's loader; what has a Multiboot header to that one; an ELF kernel with a PVH note is entered
    by that; any other ELF kernel is taken for a vmlinux. `low_ram` and `high_ram` are bytes, as `layout.split_ram`
    gives them. UsageError, one line, for whatever is wrong with the files or does not fit.
    """
    subject = f"kernel {files.kernel}"
    data = read_file(files.kernel, "kernel", max_size=KERNEL_FILE_MAX)
    header = None if bzimage.is_bzimage(data) else multiboot.find_header(data)
    image = elf.read_elf(data, subject) if header is None and data.startswith(elf.MAGIC) else None
    pvh = image is not None and image.pvh_entry is not None
    if files.kaslr and (header is not None or pvh):
        raise UsageError(f"{subject}: cannot place itself at random; give a bzImage, or no --kaslr")

    # The initrd is the first module; a Multiboot module's text begins with its name, as boot loaders have it.
    modules = [*([ModuleFile(files.initrd)] if files.initrd is not None else []), *files.modules]
    if header is not None:
        named = [ModuleFile(module.path, f"{module.path} {module.text}".rstrip()) for module in modules]
        line = f"{files.kernel} {files.append or ''}".rstrip()
        return multiboot.load_multiboot(memory, data, header, subject, line, named, low_ram, high_ram)
    append = LINUX_APPEND if files.append is None else files.append
    if image is not None and pvh:
        return load_pvh(memory, image, subject, append, modules, low_ram, high_ram, rsdp=rsdp)
    if files.modules:
        raise UsageError(
            f"--module {files.modules[0].path}: this Linux kernel takes none; give its initial RAM disk as --initrd"
        )
    return load_linux(
        memory,
        files.kernel,
        files.initrd,
        append,
        low_ram,
        high_ram,
        kaslr=files.kaslr,
        la57=files.la57,
        rsdp=rsdp,
        data=data,
    )
