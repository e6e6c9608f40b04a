"""The page of the server in a real browser: a photo that is dropped on it gets its label."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import make_bundle, photos

pytest.importorskip("fastapi")
from test_server import serving

from dynadapter.exits.policies import Never
from dynadapter.serve.engine import Engine

BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
DROP = """(async () => {
  const at = id => document.getElementById(id)
  const wait = async done => { while (!done()) await new Promise(next => setTimeout(next, 20)) }
  await wait(() => document.readyState === 'complete' && at('bundle')?.options.length)
  const data = new DataTransfer()
  const bytes = Uint8Array.from(atob('%s'), letter => letter.charCodeAt(0))
  data.items.add(new File([bytes], 'a.png', {type: 'image/png'}))
  at('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))
  await wait(() => at('answer').textContent || at('error').textContent)
  await wait(() => at('photo').complete)
  return {
    answer: at('answer').textContent, error: at('error').textContent, photo: at('photo').naturalWidth,
    top: [...at('top').rows].map(row => row.cells[0].textContent),
  }
})()"""


class Browser:
    """Chromium by its debugging protocol over pipes: messages of JSON, each ended by a zero byte."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing, self.number, self.rest = reading, writing, 0, b""

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.reading, 65536)
                assert part, "the browser ended"
                self.rest += part
            text, _, self.rest = self.rest.partition(b"\0")
            if (answer := json.loads(text)).get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Run Chromium, which reads from its descriptor 3 and writes to 4."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    line = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', str(BROWSER), *options]
    with subprocess.Popen(line, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_in, ours_out)
        finally:
            process.kill()
            os.close(ours_in)
            os.close(ours_out)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_dropped_photo_gets_its_label(tmp_path):
    bundle = make_bundle(Never())
    photo = photos(1)[0]
    with serving({"flowers": Engine(bundle, name="flowers")}) as client, browser(tmp_path / "profile") as made:
        target = made.ask("Target.createTarget", url="about:blank")["targetId"]
        session = made.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        made.ask("Page.navigate", session, url=f"http://127.0.0.1:{client.port}/")

        def dropped(data: bytes) -> dict[str, Any]:
            script = DROP % base64.b64encode(data).decode()
            wanted = {"expression": script, "awaitPromise": True, "returnByValue": True}
            found = made.ask("Runtime.evaluate", session, **wanted)
            assert "exceptionDetails" not in found, found
            return found["result"]["value"]

        good, bad = dropped(photo), dropped(b"no photo")
    label = bundle.predict(photo)[0].label
    assert good["answer"].startswith(f"{label}: exit 3 of 3, 3.00 GMACs, ")
    assert (good["error"], good["photo"], good["top"][0], len(good["top"])) == ("", 32, label, 5)
    assert (bad["answer"], bad["photo"]) == ("", 0)
    assert "the body cannot be read as an image: not an image of a known format" in bad["error"]
