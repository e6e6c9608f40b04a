"""``dynadapter push OWNER/NAME --bundle FOLDER``: upload a bundle to the Hugging Face Hub."""

from dynadapter.cli.errors import Mistake, mistakes
from dynadapter.cli.networks import check_network
from dynadapter.cli.parser import CommandParser


def parser() -> CommandParser:
    """Return the parser of the command."""
    made = CommandParser(
        "push",
        "Check a bundle and upload it to the Hugging Face Hub, with a card that has its numbers. Log in by hf auth "
        "login first, or set HF_TOKEN.",
        usage="dynadapter push OWNER/NAME --bundle FOLDER [--KEY VALUE ...]",
    )
    made.add_argument("name", type=str, help="OWNER/NAME on the hub; created if it does not exist.")
    made.add_argument("--bundle", type=str, required=True, help="The folder that calibrate wrote.")
    made.add_argument("--private", action="store_true", help="Make a new repository private.")
    made.add_argument("--revision", type=str | None, help="Branch to write to, created if it does not exist.")
    words = "License for the card, such as apache-2.0; by default the one that timm names for the backbone's weights."
    made.add_argument("--license", type=str | None, help=words)
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    given = parser().parse_args(args)
    owner, _, name = given.name.partition("/")
    if not owner or not name or "/" in name or ":" in given.name:
        raise Mistake(f"{given.name!r} is not a name on the hub; give OWNER/NAME, as in: dynadapter push me/flowers")
    check_network(given.bundle)
    from dynadapter.serve.bundle import push_to_hub

    with mistakes():
        address = push_to_hub(
            given.bundle, given.name, private=given.private or None, revision=given.revision, license=given.license
        )
    place = f"hf-hub:{given.name}" + (f"@{given.revision}" if given.revision else "")
    print(f"the bundle is at {address}")
    print(f"classify images with: dynadapter predict --bundle {place} --images FOLDER --out labels.csv")
