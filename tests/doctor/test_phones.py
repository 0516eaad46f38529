"""adb and phones, with a small adb that prints what the real one prints.

The texts are those of adb 1.0.41 (29.0.6, run without phones) and of its sources: ``adb.cpp`` names
the states, ``diagnose_usb.cpp`` the permissions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.doctor.phones import KEYBOARD, check_phones

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the small adb is a shell script")

VERSION = "Android Debug Bridge version 1.0.41\nVersion 29.0.6-debian\nInstalled as /usr/bin/adb\n"
STARTED = "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n"
PHONE = (
    f"model=Pixel 7\nandroid=14\ndeveloper=1\nenabled=com.x/.Ime {KEYBOARD}\ninstalled={KEYBOARD}\n"
)
SEE = "see [http://developer.android.com/tools/device.html]"
Check = Callable[..., list[Finding]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Run the checks with an adb that answers as told; its calls are in ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def check(
        devices: str, *, phone: str = PHONE, said: str = "", code: int = 0, version: str = VERSION
    ) -> list[Finding]:
        texts = {"version": version, "said": said, "devices": devices, "phone": phone}
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        adb = folder / "adb"
        adb.write_text(
            f'#!/bin/sh\ncd "{tmp_path}"; echo "$*" >> calls\n'
            'case "$1" in\n'
            "version) cat version ;;\n"
            "devices) cat said >&2; : > said; cat devices\n"
            f"test -e later && mv later devices; exit {code} ;;\n"
            "-s) cat phone ;;\n"
            "esac\n"
        )
        adb.chmod(0o755)
        return list(check_phones())

    return check


def listed(*lines: str) -> str:
    return "\n".join(("List of devices attached", *lines, "", ""))


def calls(tmp_path: Path) -> list[str]:
    return [line.split(" shell ")[0] for line in (tmp_path / "calls").read_text().splitlines()]


def test_ready_phone_is_told_with_model_android_and_keyboard(check: Check, tmp_path: Path) -> None:
    adb, phone = check(listed("R58M\tdevice"))
    assert (adb.state, adb.hint) == ("ok", "")
    assert adb.text.startswith("1.0.41 (29.0.6-debian) at ")
    assert phone.name == "phone R58M"
    assert (phone.state, phone.hint) == ("ok", "")
    assert phone.text == "Pixel 7, Android 14, ready; developer options on; ADB Keyboard enabled"
    assert calls(tmp_path) == ["version", "devices", "-s R58M"]


@pytest.mark.parametrize(
    ("state", "text", "hint"),
    [
        ("unauthorized", "consent", "accept 'Allow USB debugging?'"),
        ("offline", "does not answer", "adb kill-server"),
        ("authorizing", "asked for consent", "unlock the phone"),
        ("recovery", "recovery mode", "adb -s R58M reboot"),
        ("sideload", "sideload mode", "adb -s R58M reboot"),
        ("bootloader", "bootloader", "fastboot reboot"),
        (f"no permissions (user me is not in the plugdev group); {SEE}", "this user", "usermod"),
        (f"no permissions (missing udev rules? user is in the plugdev group); {SEE}", "", "udev"),
        (f"no permissions; {SEE}", "may not be opened", "udev"),
        ("detached", "'detached'", "replug it"),
    ],
)
def test_phone_that_is_not_ready_is_told_in_plain_words(
    check: Check, monkeypatch: pytest.MonkeyPatch, state: str, text: str, hint: str
) -> None:
    _, phone = check(listed(f"R58M\t{state}"))
    assert phone.state == "note"
    assert text in phone.text
    assert hint in phone.hint or (hint == "udev" and "platform-tools-common" in phone.hint)


def test_phone_in_the_network_is_connected_again(check: Check) -> None:
    _, phone = check(listed("192.168.1.5:5555\toffline"))
    assert phone.hint == "adb disconnect 192.168.1.5:5555; adb connect 192.168.1.5:5555"


@pytest.mark.parametrize(
    ("enabled", "installed", "hint"),
    [
        ("com.x/.Ime", f"com.x/.Ime {KEYBOARD}", f"adb -s R58M shell ime enable {KEYBOARD}"),
        ("com.x/.Ime", "com.x/.Ime", "get ADBKeyboard.apk from https://github.com/senzhk/"),
    ],
)
def test_phone_without_the_keyboard_is_usable_but_noted(
    check: Check, enabled: str, installed: str, hint: str
) -> None:
    phone = (
        f"model=M\r\nandroid=9\r\ndeveloper=null\r\nenabled={enabled}\r\ninstalled={installed}\r\n"
    )
    _, found = check(listed("R58M\tdevice"), phone=phone)
    assert found.state == "note"
    assert found.text.startswith("M, Android 9, ready; developer options unknown; ")
    assert found.hint.startswith(hint)


def test_phone_that_left_meanwhile_is_noted(check: Check) -> None:
    _, phone = check(listed("R58M\tdevice"), phone="error: device 'R58M' not found\n")
    assert (phone.state, phone.hint) == ("note", "replug it")
    assert phone.text == "does not answer (error: device 'R58M' not found)"


def test_no_phone_is_noted_with_the_way_to_usb_debugging(check: Check) -> None:
    _, phone = check(listed())
    assert (phone.name, phone.state) == ("phone", "note")
    assert "USB debugging" in phone.hint


@pytest.mark.parametrize(
    ("said", "stopped"),
    [
        ("", False),
        (STARTED, True),
        ("adb server version (39) doesn't match this client (41); killing...\n" + STARTED, False),
    ],
)
def test_server_is_stopped_if_it_was_started_for_this(
    check: Check, tmp_path: Path, said: str, stopped: bool
) -> None:
    check(listed("R58M\tdevice"), said=said)
    assert ("kill-server" in calls(tmp_path)) == stopped


def test_phone_is_awaited_when_the_server_has_just_started(check: Check, tmp_path: Path) -> None:
    (tmp_path / "later").write_text(listed("R58M\tdevice"))
    _, phone = check(listed("R58M\tauthorizing"), said=STARTED)
    assert phone.state == "ok"


def test_adb_whose_server_fails_is_noted(check: Check) -> None:
    said = "adb: failed to check server version: cannot connect to daemon\n"
    (adb,) = check("", said=said, code=1)
    assert (adb.state, adb.hint) == ("note", "adb kill-server, then try again")
    assert "cannot connect to daemon" in adb.text


def test_adb_that_does_not_run_or_is_not_there_is_noted(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin" / "adb").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "bin" / "adb").chmod(0o755)
    (adb,) = check_phones()
    assert (adb.state, "does not run" in adb.text) == ("note", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    (adb,) = check_phones()
    assert adb == Finding(
        "adb",
        "note",
        "not found; only the phone agent needs it",
        "install Android's platform-tools: "
        "https://developer.android.com/tools/releases/platform-tools",
    )
