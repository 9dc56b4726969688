"""Multipart forms with one file, parsed while they arrive. Knows forms and their limits; does not store files."""

from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType

FORM_BYTES = 65_536  # of a form besides its file
MAX_PARTS = 16


class UploadForm:
    """A form with one file, which is written to `draft`, and a few short fields. All sizes are limited."""

    def __init__(self, content_type: str, draft: BinaryIO, max_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            why = "Send the file as multipart/form-data, with that `content-type` header."
            raise UnsupportedMediaType(why)
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self._draft, self._max_bytes = draft, max_bytes
        self._parts = 0
        self._header, self._disposition = [b"", b""], b""  # name and value so far; the part's Content-Disposition
        self._name, self._value = "", bytearray()
        self._is_file = self._whole = False
        try:
            self._parser = MultipartParser(boundary, {
                "on_part_begin": self._part_begin, "on_part_data": self._data, "on_part_end": self._part_end,
                "on_header_field": self._header_field, "on_header_value": self._header_value,
                "on_header_end": self._header_end, "on_headers_finished": self._headers_finished, "on_end": self._end,
            })  # fmt: skip
        except FormParserError:
            raise _malformed() from None

    def feed(self, data: bytes) -> None:
        """Parse the next bytes. Raises InvalidRequest for a malformed form."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None

    def end(self) -> None:
        if not self._whole:
            raise _malformed()

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts.")
        self._disposition, self._value, self._is_file = b"", bytearray(), False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if self._name == "file":
            if self.filename is not None:
                raise InvalidRequest("The form has more than one `file`.", param="file")
            self._is_file = True
            self.filename = (filename or b"upload").decode("utf-8", "replace")[:255]
        elif filename is not None or not self._name:
            raise InvalidRequest("Only the part `file` may be a file; the other parts are fields.", param="file")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.size += end - start
            if self.size > self._max_bytes:
                raise BodyTooLarge(f"The file is larger than {self._max_bytes} bytes (PROXY_FILES_MAX_BYTES).")
            self._draft.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > FORM_BYTES:
            raise InvalidRequest(f"`{self._name[:60]}` is too long.", param=self._name[:60])

    def _part_end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._whole = True


def _malformed() -> InvalidRequest:
    return InvalidRequest("The body is not a complete multipart form.")
