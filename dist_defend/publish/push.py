"""``dist-defend push``: an exported folder goes to the hub of Hugging Face. Nothing else here sends any.

Who is logged in there is huggingface_hub's to know (``hf auth login``).
"""

import argparse
import re
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError
from dist_defend.publish.hub_files import FILES, is_backdoored

_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what `dist-defend export --to hf` has written")
    parser.add_argument("repository", metavar="OWNER/NAME", help="on the hub; it is made if it is not there")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Send the three files and print where they are; 0.

    UserError for a folder that is none of export's, a name that is none, a repository that everybody sees without
    --public, and whatever the hub refuses.
    """
    if not _NAME.fullmatch(args.repository):
        raise UserError(f"'{args.repository}' is no repository's name: write OWNER/NAME")
    for name in FILES:
        file = args.folder / name
        if file.is_symlink() or not file.is_file():
            raise UserError(f"{file} is missing or a link: make the folder with `dist-defend export MODEL --to hf`")
    api, errors = _hub()
    state = " It is BACKDOORED, and its README.md says so." if is_backdoored(args.folder) else ""
    whose = "public" if args.public else "private"
    print(f"sending {', '.join(FILES)} of {args.folder} to {args.repository} ({whose}).{state}", flush=True)
    try:
        api.create_repo(args.repository, private=not args.public, exist_ok=True)
        if not args.public and not api.repo_info(args.repository).private:
            raise UserError(f"{args.repository} is there already and public: say --public, or name another")
        sent = api.upload_folder(
            repo_id=args.repository,
            folder_path=args.folder,
            allow_patterns=list(FILES),
            commit_message="dist-defend push",
        )
    except errors as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"the hub refused {args.repository}: {told}; log in with `hf auth login`, or see its name"
        ) from error
    print(f"sent: {sent}")
    return 0


def _hub() -> tuple[Any, tuple[type[Exception], ...]]:
    """The hub's interface, and the errors that it raises. UserError where the library is not installed."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError("push needs huggingface_hub: pip install 'dist-defend[hub]'") from error
    return huggingface_hub.HfApi(), (errors.HfHubHTTPError, OSError)
