"""adb and the phones it sees, for Open-AutoGLM's phone agent.

Knows adb's words as its sources have them (``adb.cpp``, ``transport.cpp``, ``diagnose_usb.cpp``),
versions 1.0.39 to 1.0.41.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from autoglm_gguf.doctor.finding import Finding
from autoglm_gguf.programs import Answer, ask_program, find_program, install_command

KEYBOARD = "com.android.adbkeyboard/.AdbIME"
"""What the phone agent types with."""
_PLATFORM_TOOLS = (
    "install Android's platform-tools: https://developer.android.com/tools/releases/platform-tools"
)
_STARTED = "daemon not running"  # this command starts the server
_REPLACED = "doesn't match this client"  # it replaces another adb's server
_LISTED = "List of devices attached"
_COMING = ("authorizing", "connecting", "offline")  # states of the first moments
_TRIES = 4
_ASK_PHONE = "; ".join(
    (
        "echo model=$(getprop ro.product.model)",
        "echo android=$(getprop ro.build.version.release)",
        "echo developer=$(settings get global development_settings_enabled)",
        "echo enabled=$(ime list -s)",
        "echo installed=$(ime list -a -s)",
    )
)


def check_phones() -> Iterator[Finding]:
    """adb, then every phone; a server that was started for this is stopped again."""
    adb = find_program("adb")
    if adb is None:
        hint = install_command(
            apt="adb",
            dnf="android-tools",
            pacman="android-tools",
            pkg="android-tools",
            brew="android-platform-tools",
            winget="Google.PlatformTools",
        )
        text = "not found; only the phone agent needs it"
        yield Finding("adb", "note", text, hint or _PLATFORM_TOOLS)
        return
    version = ask_program([adb, "version"])
    if version is None or version.code != 0:
        text = f"{adb} does not run{_said(version)}"
        yield Finding("adb", "note", text, _PLATFORM_TOOLS)
        return
    started = False
    try:
        listed = ask_program([adb, "devices"], seconds=30)
        text = "" if listed is None else listed.text
        started = _STARTED in text and _REPLACED not in text
        if listed is None or listed.code != 0 or _LISTED not in text:
            told = f"{adb} cannot list phones{_said(listed)}"
            yield Finding("adb", "note", told, "adb kill-server, then try again")
            return
        yield Finding("adb", "ok", f"{_version(version.text)} at {adb}")
        yield from _check_listed(adb, _settled(adb, text) if started else parse_phones(text))
    finally:
        if started:
            ask_program([adb, "kill-server"])


def parse_phones(text: str) -> list[tuple[str, str]]:
    """Serial and state of each phone that ``adb devices`` lists."""
    lines = text.partition(_LISTED)[2].splitlines()
    pairs = (line.partition("\t") for line in lines if "\t" in line)
    return [(serial.strip(), state.strip()) for serial, _, state in pairs]


def _settled(adb: str, text: str) -> list[tuple[str, str]]:
    """What a server that has just started sees after a moment."""
    for _ in range(_TRIES):
        phones = parse_phones(text)
        if not any(state in _COMING for _, state in phones):
            break
        time.sleep(0.5)
        listed = ask_program([adb, "devices"])
        text = listed.text if listed and listed.code == 0 else text
    return parse_phones(text)


def _check_listed(adb: str, phones: list[tuple[str, str]]) -> Iterator[Finding]:
    if not phones:
        hint = (
            "on the phone: Settings > About phone > tap Build number seven times, then Developer "
            "options > USB debugging; then connect it with a cable that carries data"
        )
        yield Finding("phone", "note", "none connected", hint)
    for serial, state in phones:
        yield _ready(adb, serial) if state == "device" else _not_ready(serial, state)


def _not_ready(serial: str, state: str) -> Finding:
    """adb's word for a state, in plain ones."""
    text, hint = {
        "unauthorized": (
            "waits for your consent",
            "unlock the phone and accept 'Allow USB debugging?'; if it does not ask: "
            "adb kill-server, then replug",
        ),
        "authorizing": ("is being asked for consent", "unlock the phone, then try again"),
        "connecting": ("is connecting", "try again in a moment"),
        "offline": (
            "does not answer",
            f"adb disconnect {serial}; adb connect {serial}"
            if ":" in serial
            else "replug it, or: adb kill-server",
        ),
    }.get(state, ("", ""))
    if state.startswith("no permissions"):
        text = f"may not be opened by this user ({state})"
        hint = "sudo usermod -aG plugdev $USER, then log in again"
        if "not in the plugdev group" not in state:
            udev = install_command(apt="android-sdk-platform-tools-common", pacman="android-udev")
            hint = f"{udev or 'install a udev rule for the phone'}, then replug it"
    elif state in ("recovery", "sideload", "rescue"):
        text, hint = f"is in {state} mode, not in Android", f"adb -s {serial} reboot"
    elif state == "bootloader":
        text, hint = "is in its bootloader, not in Android", "fastboot reboot"
    return Finding(
        f"phone {serial}",
        "note",
        text or f"adb says {state!r}",
        hint or "replug it, then try again",
    )


def _ready(adb: str, serial: str) -> Finding:
    """A phone that takes commands: model, Android, developer options, keyboard."""
    name = f"phone {serial}"
    answer = ask_program([adb, "-s", serial, "shell", _ASK_PHONE])
    lines = answer.text.splitlines() if answer and answer.code == 0 else []
    told = {key: value.strip() for key, found, value in (x.partition("=") for x in lines) if found}
    if "model" not in told:
        return Finding(name, "note", f"does not answer{_said(answer)}", "replug it")
    developer = {"1": "on", "0": "off"}.get(told.get("developer", ""), "unknown")
    text = (
        f"{told['model'] or 'unknown model'}, Android {told.get('android') or 'unknown'}, ready; "
        f"developer options {developer}"
    )
    if KEYBOARD in told.get("enabled", "").split():
        return Finding(name, "ok", f"{text}; ADB Keyboard enabled")
    if KEYBOARD in told.get("installed", "").split():
        hint = f"adb -s {serial} shell ime enable {KEYBOARD}"
        return Finding(name, "note", f"{text}; ADB Keyboard is not enabled", hint)
    hint = (
        f"get ADBKeyboard.apk from https://github.com/senzhk/ADBKeyBoard, then: adb -s {serial} "
        f"install ADBKeyboard.apk; adb -s {serial} shell ime enable {KEYBOARD}"
    )
    return Finding(name, "note", f"{text}; no ADB Keyboard, so that the agent cannot type", hint)


def _version(text: str) -> str:
    """``1.0.41 (29.0.6-debian)`` of ``adb version``'s first two lines."""
    numbers = [line.rpartition("ersion ")[2] for line in text.splitlines()[:2]]
    return " ".join((*numbers[:1], *(f"({number})" for number in numbers[1:])))


def _said(answer: Answer | None) -> str:
    if answer is None:
        return ""
    if answer.code is None:
        return " (no end in time)"
    return f" ({answer.lines[-1]})" if answer.lines else f" (exit code {answer.code})"
