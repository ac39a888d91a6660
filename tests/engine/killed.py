"""Training in a process that test_kill.py may kill at any moment; a third of its time is spent inside saves."""

import io
import time

from rich.console import Console
from tests.engine import toy

from quintic.engine import Settings, loop, saving
from quintic.engine.run import Run


def train(folder, steps, pause, background, told):
    """Train or go on; ``told`` hears ``ready`` after the first step and ``done`` at the end."""

    class Slow(toy.ToyTask):
        def after_step(self, model, progress):
            if not self.steps:
                told.send("ready")
            time.sleep(pause)
            return super().after_step(model, progress)

    plain = saving.sha256_file

    def slowly(path):
        time.sleep(pause)  # three files a save
        return plain(path)

    saving.sha256_file = slowly
    if folder.exists():
        run = Run.open(folder)
        settings = Settings.from_toml(run.settings_text(), toy.TYPES)
    else:
        overrides = (f"steps={steps}", "checkpoint_every=3", "eval_every=40", "ema_decay=0.9")
        background = f"background_save={str(background).lower()}"
        settings, run = toy.toy_run(folder, *(f"engine.{words}" for words in (*overrides, background)))
    loop.train(Slow(), settings, run, Console(file=io.StringIO()), quiet_peak=True)
    told.send("done")
