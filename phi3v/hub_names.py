"""Names of repositories on the Hub, and their revisions: branches, tags and commits."""

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

data_commits: dict[str, str] = {}  # for each data set that this run has read from the Hub's cache, its commit


@dataclass(frozen=True)
class Wanted:
    """A repository on the Hub, and how messages speak of it."""

    repo: str
    kind: str = "model"  # or "dataset"
    revision: str | None = None
    config: str | None = None  # of a data set

    def __str__(self):
        config = f" ({self.config})" if self.config else ""
        return f"{self.repo}{f'@{self.revision}' if self.revision else ''}{config}"

    @property
    def command(self) -> str:
        """The command that downloads it."""
        command = f"hf download {self.repo}"
        if self.revision:
            command += f" --revision {self.revision}"
        if self.kind == "dataset":
            command += " --repo-type dataset"
        return command + (f" --include README.md --include '{self.config}/*'" if self.config else "")


def is_hub_name(name: str) -> bool:
    """Whether `name` is a repository, such as owner/name, and no folder or file."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).parent.is_dir()


def split_revision(name: str, flag: str = "model_name_or_path") -> tuple[str, str | None]:
    """("owner/name", "revision") for owner/name@revision; (name, None) for any other name, and for folders.

    flag: where the name was given. Raises InputError if nothing stands behind the @.
    """
    repo, mark, revision = name.partition("@")
    if not mark or not is_hub_name(repo) or Path(name).exists():
        return name, None
    if not revision:
        raise InputError(f"--{flag} {name} names no revision behind the @: give a branch, a tag or a commit")
    return repo, revision


def model_and_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """--model_name_or_path without its @revision, and the revision that it or --model_revision gives.

    Raises InputError if the two contradict each other, or if there is a revision of a local folder.
    """
    repo, own = split_revision(name)
    if own and revision and own != revision:
        raise InputError(f"--model_name_or_path {name} and --model_revision {revision} contradict each other: give one")
    if revision and not is_hub_name(repo):
        raise InputError(f"--model_revision {revision} is for a name on the Hub, and --model_name_or_path is {name}")
    return repo, own or revision


def data_revisions(given: str | None) -> dict[str | None, str]:
    """--data_revision by data set: {None: revision} for "revision", which is meant for all data sets;
    {"owner/name": revision, …} for "owner/name@revision,…". Raises InputError for another form."""
    if given is None:
        return {}
    revisions = {}
    for part in given.split(","):
        repo, mark, revision = part.strip().rpartition("@")
        if not revision or mark and not is_hub_name(repo) or (repo or None) in revisions:
            raise InputError(
                f"--data_revision {given}: give a branch, a tag or a commit; or for several data sets "
                "OWNER/NAME@REVISION,OWNER/NAME@REVISION"
            )
        revisions[repo or None] = revision
    return revisions


def data_revision(repo: str, given: str | None) -> str | None:
    """The revision that --data_revision gives for a data set; None if it gives none."""
    revisions = data_revisions(given)
    return revisions.get(repo, revisions.get(None))


def check_data_revisions(given: str | None):
    """Raises InputError if --data_revision names a data set that this run has not read."""
    if unused := data_revisions(given).keys() - {None} - data_commits.keys():
        read = ", ".join(sorted(data_commits)) or "none"
        raise InputError(
            f"--data_revision names {', '.join(sorted(unused))}, which this run does not read; it reads {read}"
        )
