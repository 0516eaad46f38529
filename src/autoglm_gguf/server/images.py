"""Image addresses become bytes: ``data:`` URLs always, the web only where it is allowed.

What comes out is a still image of a common format and of no more pixels than allowed, by its
header: nothing is decoded here. Paths and ``file:`` addresses are never opened.
"""

from __future__ import annotations

import asyncio
import binascii
import io
import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

from autoglm_gguf.server.errors import ApiError
from autoglm_gguf.server.params import PORTS, ServerParams

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_FETCH_S = 10.0


def read_image(url: str, params: ServerParams, param: str) -> bytes:
    """The file behind an address of a request.

    Args:
        url: As the client sent it.
        params: What is allowed.
        param: The field it came in, for errors.

    Raises:
        ApiError: It is refused, or no image; 400.
    """
    scheme = url[: url.find(":")].lower() if ":" in url[:10] else ""
    if scheme == "data":
        data = _read_data(url, param)
    elif scheme in PORTS and params.fetch_images:
        data = fetch_image(url, params.max_body_bytes, param)
    elif scheme in PORTS:
        raise _refuse(param, "web addresses are not fetched by this server", _EMBED)
    else:
        raise _refuse(param, "not a data: URL", _EMBED)
    _check(data, params.max_image_pixels, param)
    return data


_EMBED = "send the image itself: data:image/png;base64,…"


def _read_data(url: str, param: str) -> bytes:
    comma = url.find(",")
    if comma < 0 or ";base64" not in url[:comma].lower():
        raise _refuse(param, "its data: URL is not base64", _EMBED)
    try:  # base64.b64decode would make one copy more
        return binascii.a2b_base64(url[comma + 1 :], strict_mode=True)
    except ValueError as error:  # binascii.Error is one
        raise _refuse(param, f"its data: URL is not base64 ({error})", _EMBED) from error


def _check(data: bytes, max_pixels: int, param: str) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise _refuse(param, "more pixels than Pillow opens") from error
    except Exception as error:  # Pillow's readers raise nearly everything on broken files
        raise _refuse(param, f"not an image ({', '.join(FORMATS)})") from error
    if not 0 < width * height <= max_pixels:
        raise _refuse(
            param, f"too large or empty ({width}x{height} px, {max_pixels} pixels at most)"
        )


def fetch_image(url: str, max_bytes: int, param: str) -> bytes:
    """Download an image from the public internet, within ten seconds once its name is looked up.

    The name is looked up once, and that very address is connected to: a name that answers otherwise
    the second time gains nothing. Redirects and proxies are not followed. Not for a thread that
    runs an event loop.

    Raises:
        ApiError: Not a public address, too large, too slow, or not there; 400.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or PORTS[parts.scheme]
    except ValueError as error:
        raise _refuse(param, "not an address") from error
    if parts.username is not None or port != PORTS[parts.scheme] or not host:
        raise _refuse(param, "an address with a user, an odd port, or no host")
    address = public_address(host, port)
    if address is None:
        raise _refuse(param, "not a public address")
    return asyncio.run(_download(_at(parts, address, port), host, max_bytes, param))


async def _download(url: str, host: str, max_bytes: int, param: str) -> bytes:
    """In a loop, since only there a whole request can have a deadline: httpx counts single reads,
    so a site that sends a byte now and then would go on for hours.
    """
    import httpx2

    headers = {"Host": host, "Accept": "image/*", "Accept-Encoding": "identity"}
    data = bytearray()
    try:
        async with (
            asyncio.timeout(_FETCH_S),
            httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
            client.stream("GET", url, headers=headers, extensions={"sni_hostname": host}) as answer,
        ):
            if answer.status_code != 200:
                raise _refuse(param, f"its server answered {answer.status_code}")
            async for piece in answer.aiter_raw():  # undecoded: a small gzip can be a large image
                data += piece
                if len(data) > max_bytes:
                    raise _refuse(param, "too large")
    except TimeoutError as error:
        raise _refuse(param, "too slow") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _refuse(param, "cannot be fetched") from error
    return bytes(data)


def public_address(host: str, port: int) -> str | None:
    """An address of a host, if all of them are on the public internet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # ValueError: a zero byte, a label of more than 63
        return None
    addresses = [str(entry[4][0]) for entry in found]
    return addresses[0] if addresses and all(map(_is_public, addresses)) else None


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return _is_public(str(inner))
        if ip.teredo is not None or ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # leads to any IPv4 address, private ones too


def _at(parts: SplitResult, address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{host}:{port}{parts.path or '/'}{query}"


def _refuse(param: str, why: str, hint: str = "") -> ApiError:
    return ApiError(400, "invalid_image_url", f"{param}: {why}", param=param, hint=hint)
