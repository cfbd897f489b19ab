"""Prints what a vLLM wheel requires on this host, one line each, without the packages that are installed before it.

Does not cover: extras. Usage: `requirements.py WHEEL WITHOUT …`; needs `packaging`.

A wheel of the CPU build asks for torch builds that its own index has; torch comes from the constraints instead, and
neither audio nor video is served.
"""

import sys
import zipfile
from email import message_from_string

from packaging.requirements import Requirement


def main(wheel: str, *without: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name.lower() not in without:
            requirement.marker = None
            sys.stdout.write(f"{requirement}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
