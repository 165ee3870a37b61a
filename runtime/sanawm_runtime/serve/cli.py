"""`sanawm serve`."""

from __future__ import annotations

import json
import logging
import re
import secrets
import socket
import ssl
from pathlib import Path

import click

from sanawm.console import progress, stderr
from sanawm.errors import InputError

_log = logging.getLogger("sanawm.serve")
# A scheme, a host and perhaps a port, without a path.
_ORIGIN = re.compile(r"https?://[^/\s]+", re.IGNORECASE)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; anything but this machine asks clients for a token.")
@click.option("--port", default=8960, show_default=True, type=click.IntRange(0, 65535), help="0 takes any that is free.")
@click.option("--token", envvar="SANAWM_TOKEN", help="Token that clients must present [env SANAWM_TOKEN]; made up where one is needed.")
@click.option("--origin", "origins", multiple=True, help="Web origin of another page that may connect, https://example.org; may be repeated.")
@click.option("--name", "names", multiple=True, help="Further host name under which the server answers on this machine; may be repeated.")
@click.option("--certificate", type=click.Path(path_type=Path, exists=True), help="TLS certificate chain (PEM).")
@click.option("--certificate-key", type=click.Path(path_type=Path, exists=True), help="Its private key (PEM).")
@click.option("--sessions", default=4, show_default=True, type=click.IntRange(1, 1024), help="Worlds that run at once.")
@click.option("--max-image-mb", default=16.0, show_default=True, type=click.FloatRange(0.01, 256), help="Size of an uploaded image.")
@click.option("--max-prompt", default=4000, show_default=True, type=click.IntRange(1, 100_000), help="Characters of a prompt.")
@click.option("--linger", default=15.0, show_default=True, type=click.FloatRange(0, 3600), help="Seconds a world waits for a lost client.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: all cores.")
@click.option(
    "--trusted-key", "trusted", multiple=True, type=click.Path(path_type=Path), envvar="SANAWM_TRUSTED_KEYS", show_envvar=True,
    help="Public key that must have signed BUNDLE; with several, one of them.",
)  # fmt: skip
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps encoded prompts between runs.")
@click.option("--free-encoders", is_flag=True, help="Give back the encoders' memory after each start.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Logs as JSON lines, and one JSON line on stdout when ready.")
def serve(
    bundle: Path, host: str, port: int, token: str | None, origins: tuple[str, ...], names: tuple[str, ...], certificate: Path | None,
    certificate_key: Path | None, sessions: int, max_image_mb: float, max_prompt: int, linger: float, threads: int | None,
    trusted: tuple[Path, ...], cache: Path | None, free_encoders: bool, log_level: str, as_json: bool,
) -> None:  # fmt: skip
    """Open a page on which people steer worlds from BUNDLE, live.

    SIGINT and SIGTERM end it after the chunk in progress.
    """
    from sanawm_runtime.logs import set_up
    from sanawm_runtime.serve.app import create_app
    from sanawm_runtime.serve.guard import LOOPBACK
    from sanawm_runtime.serve.limits import Limits
    from sanawm_runtime.serve.server import Server, listen
    from sanawm_runtime.world import World

    _check_tls(certificate, certificate_key)
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise InputError(f"expected --origin as a browser sends it, such as https://example.org or http://localhost:3000, found '{origin}'")
    local = host.lower() in LOOPBACK
    if not local and token is None:
        token = secrets.token_urlsafe(24)
    if token is not None and len(token) < 16:
        raise InputError("expected a token of at least 16 characters; leave --token out to get one")
    limits = Limits(
        sessions=sessions, connections=sessions + 64, image_bytes=int(max_image_mb * 2**20), prompt=max_prompt, linger_s=linger
    )
    set_up(as_json, log_level)
    if not local and certificate is None:
        _log.warning("no_tls", extra={"note": "the token and the pictures can be read on the way; use --certificate or a tunnel"})
    listening = listen(host, port)
    with (
        listening,
        World.open(bundle, threads=threads, trusted_keys=trusted or None, free_encoders=free_encoders, cache=cache) as world,
        progress() as bar,
    ):
        task = bar.add_task("loading", total=None)
        world.warm_up(lambda name, number, total: bar.update(task, description=f"loading {name}", completed=number, total=total))
        bar.stop()
        # Behind a token any name will do; without one only this machine's own.
        app = create_app(world, limits, token=token, hosts=(*LOOPBACK, *names) if token is None else None, origins=origins)
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if certificate else 'http'}://{shown}:{listening.getsockname()[1]}/"

        def ready() -> None:
            # A fragment stays in the browser: it is in no request and no log.
            address = url if token is None else f"{url}#token={token}"
            for everywhere in ("//0.0.0.0:", "//[::]:"):  # nobody can open that; others know this machine by its name
                address = address.replace(everywhere, f"//{socket.gethostname()}:")
            if as_json:
                click.echo(json.dumps({"event": "ready", "url": url, "token": token, "sessions": sessions}))
            else:
                stderr.print(f"[bold]{world.bundle.manifest.name}[/bold] is at [link={address}]{address}[/link]  (Ctrl-C ends it)", soft_wrap=True)

        tls = {} if certificate is None else {"ssl_certfile": str(certificate), "ssl_keyfile": str(certificate_key)}
        Server(app, limits, ready=ready, **tls).run(sockets=[listening])
        _log.info("stopped")


def _check_tls(certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise InputError("TLS takes --certificate and --certificate-key; give both or neither")
    if certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")  # rather than ask for one at a terminal
    except (ssl.SSLError, OSError) as error:
        what = getattr(error, "strerror", None) or error
        raise InputError(f"{certificate} and {key} are no certificate chain and its unencrypted key in PEM form ({what}); check both") from error
