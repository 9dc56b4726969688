"""`make sbom`: writes the packages of each image as a CycloneDX document, and the images' digests, to dist/.

The packages are read inside each image: Debian packages by dpkg, Python distributions by their metadata. Nothing is
downloaded, and no scanner is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lab.terminal import Exit, LabError, say

IMAGES = ("ui", "proxy", "model", "load", "redis")
# Run inside the image by sh and by Python; each prints one line for each package.
DEBIAN = r"dpkg-query -W -f '${Package} ${Version} ${Architecture}\n'"
PYTHON = """
from importlib.metadata import distributions
for each in distributions():
    licence = each.metadata.get("License-Expression") or ""
    print(each.metadata["Name"], each.version, licence)
"""


def component(kind: str, name: str, version: str, *, architecture: str = "", licence: str = "") -> dict[str, Any]:
    """A CycloneDX component. kind: type of the package URL, `deb` or `pypi`."""
    if kind == "pypi":
        name = re.sub(r"[-_.]+", "-", name).lower()
    place, more = ("debian/", f"?arch={architecture}") if kind == "deb" else ("", "")
    url = f"pkg:{kind}/{place}{name}@{version.replace(':', '%3A').replace('+', '%2B')}{more}"
    made: dict[str, Any] = {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}
    return made | {"licenses": [{"expression": licence}]} if licence else made


def components(debian: str, python: str) -> list[dict[str, Any]]:
    """Components from the lines that DEBIAN and PYTHON print, sorted by package URL, each once."""
    found: dict[str, dict[str, Any]] = {}
    for line in filter(None, debian.splitlines()):
        name, version, architecture = line.split()
        made = component("deb", name, version, architecture=architecture)
        found[made["purl"]] = made
    for line in filter(None, python.splitlines()):
        name, version, *licence = line.split(" ", 2)
        made = component("pypi", name, version, licence="".join(licence))
        found[made["purl"]] = made
    return [found[url] for url in sorted(found)]


def document(image: str, digest: str, parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A CycloneDX 1.6 document (https://cyclonedx.org). digest: the image's, `sha256:…`."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",  # the same image gives the same number
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {
                "type": "container",
                "bom-ref": image,
                "name": image.partition(":")[0],
                "version": image.partition(":")[2],
                "hashes": [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}],
            },
        },
        "components": list(parts),
    }


def main(tag: str, folder: Path) -> int:
    """Write <folder>/<service>.cdx.json for each built image, and <folder>/images.json: image -> id, digests, bytes.
    Raises LabError if no image has the tag."""
    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, dict[str, Any]] = {}
    for service in IMAGES:
        image = f"llm-lab/{service}:{tag}"
        found = _docker("image", "inspect", image)
        if found is None:
            say(f"lab: {image} is not built; skipped")
            continue
        (details,) = json.loads(found)
        has_python = service != "redis"
        debian = _inside(image, "sh", "-c", DEBIAN) or ""
        python = (_inside(image, "python", "-c", PYTHON) or "") if has_python else ""
        parts = components(debian, python)
        digest = details["Id"]
        path = folder / f"{service}.cdx.json"
        path.write_text(json.dumps(document(image, digest, parts), indent=1) + "\n", encoding="utf-8")
        digests[image] = {"id": digest, "digests": details.get("RepoDigests") or [], "bytes": details["Size"]}
        say(f"lab: {path}: {len(parts)} components")
    if not digests:
        raise LabError(Exit.WRONG_SETTING, f"no image has the tag {tag}; make up builds the images")
    (folder / "images.json").write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    return Exit.FINE


def _inside(image: str, *argv: str) -> str | None:
    return _docker("run", "--rm", "--network=none", f"--entrypoint={argv[0]}", image, *argv[1:])


def _docker(*argv: str) -> str | None:
    """Output of the docker command; None if it fails."""
    done = subprocess.run(["docker", *argv], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1] if sys.argv[1:] else "dev", Path("dist")))
    except (LabError, OSError) as error:
        say(f"lab: {error}")
        sys.exit(error.code if isinstance(error, LabError) else 1)
