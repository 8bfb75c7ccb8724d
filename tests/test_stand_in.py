"""Standing in for fal_client: aliases in `sys.modules`, and the real client pointed elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )


def test_a_module_that_imports_fal_client_runs_unmodified_after_install(tmp_path: Path) -> None:
    (tmp_path / "third_party.py").write_text(
        "import fal_client\n"
        "import fal_client.auth\n"
        "from fal_client import subscribe_async, upload_file\n"
        "from fal_client.client import FalClientHTTPError, SyncClient\n"
        "def ask():\n"
        "    try:\n"
        "        fal_client.run('fal-ai/wan-flf2v', {'prompt': 'x'})\n"
        "    except FalClientHTTPError as error:\n"
        "        return [entry['loc'][1] for entry in error.message]\n"
    )
    done = run(
        "import sys; sys.path.insert(0, '.')\n"
        "import wan_local; wan_local.install(); wan_local.install()\n"
        "import third_party\n"
        "assert third_party.ask() == ['start_image_url', 'end_image_url'], third_party.ask()\n"
        "assert third_party.fal_client is wan_local and third_party.SyncClient is wan_local.SyncClient\n"
        "assert third_party.fal_client.auth.MissingCredentialsError\n"
        "assert third_party.fal_client.auth.fetch_credentials() == 'local'\n",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_install_after_the_real_client_was_imported_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fal_client")
    done = run("import fal_client, wan_local; wan_local.install()", tmp_path)
    assert "fal_client was imported before wan_local.install()" in done.stderr


def test_redirect_points_the_real_client_at_a_server_and_sends_it_no_key_but_the_servers(tmp_path: Path) -> None:
    pytest.importorskip("fal_client")
    script = """
import http.server, json, threading, os
os.environ["FAL_KEY"] = "a-real-key"
seen = []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        seen.append((self.path, self.headers["authorization"]))
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"seed": 1, "access_url": "u", "token": "t", "token_type": "Bearer",
                           "base_url": "b", "expires_at": "2100-01-01T00:00:00+00:00"}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
import fal_client, wan_local
wan_local.redirect(f"http://127.0.0.1:{server.server_port}/")
assert fal_client.run("fal-ai/wan-flf2v", {}) ["seed"] == 1
assert fal_client.upload(b"x", "image/png") == "u"
assert seen == [("/run/fal-ai/wan-flf2v", "Key local"), ("/storage/auth/token?storage_type=fal-cdn-v3", "Key local"),
                ("/files/upload", "Bearer t")], seen
wan_local.redirect(f"http://127.0.0.1:{server.server_port}", key="sesame")
import asyncio
fal_client.SyncClient().run("fal-ai/wan-flf2v", {})
asyncio.run(fal_client.AsyncClient().run("fal-ai/wan-flf2v", {}))
assert seen[3:] == [("/run/fal-ai/wan-flf2v", "Key sesame")] * 2, seen
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_redirect_refuses_what_is_no_address_and_what_is_not_the_real_client(tmp_path: Path) -> None:
    pytest.importorskip("fal_client")
    done = run("import wan_local; wan_local.redirect('127.0.0.1:8787')", tmp_path)
    assert "ValueError: '127.0.0.1:8787' is no address" in done.stderr
    done = run("import wan_local; wan_local.install(); wan_local.redirect('http://127.0.0.1:8787')", tmp_path)
    assert "no real one to redirect" in done.stderr
