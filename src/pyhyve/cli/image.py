"""pyhyve image: the cache of guest images."""

from typing import TYPE_CHECKING, Final

from pyhyve.base.parser import Namespace, Parser

if TYPE_CHECKING:
    from pyhyve.bhyve.boot import guestimage

SUMMARY: Final = "Fetch, list and remove guest images (Debian's cloud kernel with busybox, in the user's cache)."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=("fetch", "list", "remove"), help="what to do")
    parser.add_argument("version", nargs="?", help="for remove: which one (default: all)")


def run(arguments: Namespace) -> int:
    from pyhyve.base.errors import UsageError
    from pyhyve.bhyve.boot import guestimage

    if arguments.action != "remove" and arguments.version is not None:
        raise UsageError(f"image {arguments.action}: takes no version; see 'pyhyve image --help'")
    if arguments.action == "fetch":
        from pyhyve.cli.progress import Progress

        progress = Progress()
        try:
            image = guestimage.fetch(progress)
        finally:
            progress.finish()
        _print(image)
    elif arguments.action == "list":
        for image in guestimage.list_cached():
            _print(image)
    else:
        for version in guestimage.remove(arguments.version):
            print(f"removed {version}")
    return 0


def _print(image: "guestimage.GuestImage") -> None:
    print(f"{image.version}\n  kernel  {image.kernel}\n  initrd  {image.initramfs}")
