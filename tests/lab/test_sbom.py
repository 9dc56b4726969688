"""`make sbom`: the lists that are read inside an image become CycloneDX. The stack lane runs it on the images."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

from lab import sbom

DEBIAN = "libssl3 3.0.15-1~deb12u1 amd64\ndpkg 1:1.21.22+b1 amd64\n"
PURL = re.compile(r"pkg:(deb/debian|pypi)/[a-z0-9.+-]+@[\w.%~-]+(\?arch=\w+)?")


def test_every_distribution_of_a_python_is_listed() -> None:
    """The script that runs in the images, in this Python: names as PyPI writes them, versions, licences."""
    printed = subprocess.run([sys.executable, "-c", sbom.PYTHON], capture_output=True, text=True, check=True).stdout
    parts = {part["purl"]: part for part in sbom.components(DEBIAN, printed)}
    assert f"pkg:pypi/prometheus-client@{version('prometheus_client')}" in parts
    assert parts[f"pkg:pypi/starlette@{version('starlette')}"]["licenses"] == [{"expression": "BSD-3-Clause"}]
    assert {
        "pkg:deb/debian/libssl3@3.0.15-1~deb12u1?arch=amd64",
        "pkg:deb/debian/dpkg@1%3A1.21.22%2Bb1?arch=amd64",
    } <= set(parts)
    assert [url for url in parts if not PURL.fullmatch(url)] == []


def test_a_document_names_its_image_and_is_the_same_for_the_same_image() -> None:
    digest = "sha256:" + "0f" * 32
    one, two = (sbom.document("llm-lab/proxy:dev", digest, sbom.components(DEBIAN, "")) for _ in range(2))
    assert (one["bomFormat"], one["specVersion"], one["serialNumber"]) == ("CycloneDX", "1.6", two["serialNumber"])
    assert one["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": "0f" * 32}]
    references = [part["bom-ref"] for part in one["components"]]
    assert len(set(references)) == len(references) == 2
