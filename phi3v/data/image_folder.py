"""Finds the image files that annotations name, and nothing outside of their folder."""

import os
from pathlib import Path

from ..inside import Inside, is_inside, real_folders

LONGEST_NAME = 4096  # characters; systems accept no longer path


class ImageFolder:
    """Tells whether a name belongs to a file inside a folder. It lists every folder once, because looking up each file
    takes far longer, above all on a network file system.

    follow_links: whether symbolic links inside the folder may lead out of it. The folder itself may be a link.
    Without it, paths are `Inside` paths, of which also what is opened later is checked.
    """

    def __init__(self, root: Path, follow_links: bool = False):
        self.root = os.fspath(root)
        self.prefix = os.path.join(self.root, "")
        self.folders = real_folders(root)
        self.follow_links = follow_links
        self.listings: dict[str, set[str]] = {}

    def path(self, name: str) -> str:
        """The path of the file with this name, which `missing` has not returned."""
        path = self.prefix + name
        return path if self.follow_links else Inside(path, self.folders)

    def missing(self, names: list[str]) -> list[int]:
        """The places in `names` of those that do not belong to a regular file inside the folder."""
        known, missing = self.listings.get, []
        for k, name in enumerate(names):
            cut = name.rfind("/") + 1
            if name[cut:] in known(name[:cut], ()) and len(name) <= LONGEST_NAME:
                continue
            if self._is_missing(name, name[:cut], name[cut:]):
                missing.append(k)
        return missing

    def _is_missing(self, name: str, folder: str, file: str) -> bool:
        if len(name) > LONGEST_NAME:
            return True
        if folder not in self.listings:
            self.listings[folder] = self._listing(folder)
        # A file that is not listed may still be a symbolic link, spelled differently, or in a folder that can't be
        # listed.
        return file not in self.listings[folder] and self.problem(name) is not None

    def _listing(self, folder: str) -> set[str]:
        """The names of the regular files in a folder, without symbolic links."""
        if folder.startswith("/") or ".." in folder.split("/"):
            return set()
        try:
            if not self._is_inside(os.path.join(self.root, folder)):
                return set()
            with os.scandir(os.path.join(self.root, folder)) as entries:
                return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        except (OSError, ValueError):
            return set()

    def _is_inside(self, path: str) -> bool:
        return self.follow_links or is_inside(os.path.realpath(path), self.folders)

    def problem(self, name: str) -> str | None:
        """Why a name is not a file inside the folder, worded to follow the name; None if it is one."""
        if name.startswith("/") or ".." in name.split("/"):
            return f"must be a path inside {self.root}"
        path = os.path.join(self.root, name)
        try:
            if len(name) > LONGEST_NAME:  # resolving its links would take quadratic time
                return f"but {path} does not exist"
            if not self._is_inside(path):
                return f"which is a symbolic link out of {self.root}: give --follow_links, or put the file itself there"
            if os.path.isfile(path):
                return None
            return f"but {path} is not a file" if os.path.exists(path) else f"but {path} does not exist"
        except (OSError, ValueError):  # a name that no file can have
            return f"but {path} can't exist"
