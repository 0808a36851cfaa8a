"""What a pattern of shards names."""

import glob
import os
import re
import stat
from collections.abc import Sequence

from dltrain.data.compressed import codec_named
from dltrain.errors import UserError


def scheme(url: str) -> str | None:
    """ "http", "s3", "pipe" ... or None for a path of this machine."""
    match = re.match(r"([a-z][a-z0-9+.-]*)://|(pipe):", url)
    return match and (match[1] or match[2])


def plain(url: str) -> bool:
    """Whether it is an uncompressed file of this machine, read where it lies."""
    return scheme(url) is None and codec_named(url) is None


def expand(pattern: str | Sequence[str]) -> list[str]:
    """Shards named by `pattern`: paths, urls, {000..012} braces, globs, folders of .tar files, a comma list or a list
    of these.

    UserError if it names nothing, a missing or unreadable file, or one shard twice.
    """
    parts = [pattern] if isinstance(pattern, str) else list(pattern)
    said = "shards " + ", ".join(map(repr, parts[:3])) + (", ..." if len(parts) > 3 else "")
    urls = [url for part in parts for name in _names(part, said) for url in _found(name, said)]
    if not urls:
        raise UserError(f"{said} names no file; give a path, a {{000..012}} pattern or a folder of .tar files")
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise UserError(f"{said} names {twice} twice; its samples would count double")
    return urls


def _names(part: str, said: str) -> list[str]:
    """Without braces and commas; what exists, or is a command, is itself whatever is in it."""
    plain_name = not any(letter in part for letter in "{}, ")
    if not part or plain_name or part.startswith("pipe:") or os.path.exists(os.path.expanduser(part)):
        return [part]
    from webdataset.shardlists import expand_urls  # imports torch

    try:
        # Braces around it all make a list of the outer commas too.
        return [name.strip() for name in expand_urls("{" + part + ",}")]
    except ValueError as error:
        raise UserError(f"{said}: {error}; close every brace") from error


def _found(name: str, said: str) -> list[str]:
    if not name:
        return []
    if scheme(name):
        return [name]
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        found, problem = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar"))), f"{name} holds no .tar file"
    elif glob.has_magic(name) and not os.path.exists(path):
        found, problem = sorted(glob.glob(path)), f"{name} matches nothing"
    else:
        found, problem = [path], ""
    if not found:
        raise UserError(f"{said}: {problem}; correct the pattern")
    for path in found:
        try:
            regular = stat.S_ISREG(os.stat(path).st_mode)
        except OSError:
            regular = False
        if not regular:
            raise UserError(f"{said}: {path} does not exist; correct the pattern or restore the file")
        if not os.access(path, os.R_OK):
            raise UserError(f"{said}: {path} is not readable; correct its permissions")
    return found
