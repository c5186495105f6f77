"""Two processes with half the batch each have the gradients of one process with all of it, and its metrics."""

import pytest
import toy_run

BETA_1 = 0.9  # of AdamW, whose first moment after one step is (1 - BETA_1) times the gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [["task=paint_by_example"], ["task=distill", "training.train=[unet]"]], ids=["loss", "distill"]
)
def test_two_processes_are_one(tmp_path, task):
    toy = toy_run.write(tmp_path)
    start = (f"model.init={toy_run.write_model(tmp_path)}", "model.size=null", "model.vae=null")
    assert_two_are_one(tmp_path, (toy, *task, *start), "loss")


@pytest.mark.slow
def test_two_processes_train_an_autoencoder_as_one(tmp_path):
    """And its discriminator."""
    toy_run.write(tmp_path)
    settings = (
        "task=vae",
        f"init={tmp_path / 'vae.ckpt'}",
        "training={kl_weight: 0.1, adversarial: {weight: 0.5, channels: 8, num_layers: 1}}",
        f"data={{val_size: 4, workers: 0, source: {{path: {tmp_path / 'boxes.csv'}}}}}",
        "data.recipe={resolution: 32, exemplar_size: 16}",
        "trainer={accelerator: cpu, log_every_n_steps: 1, num_sanity_val_steps: 0, enable_progress_bar: false}",
    )
    assert_two_are_one(tmp_path, settings, "discriminator")


def assert_two_are_one(folder, settings, metric):
    settings = (*settings, "trainer.max_steps=1", "trainer.val_check_interval=1")
    ddp = ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=2")
    process = toy_run.start(*settings, f"run={folder / 'two'}", *ddp)
    toy_run.run(*settings, f"run={folder / 'one'}", "data.batch_size=4")
    assert "MEMBER: 2/2" in toy_run.finish(process)

    one, two = (toy_run.checkpoint(folder / name, 1)["optimizer_states"][0]["state"] for name in ("one", "two"))
    gradients = [(one[i]["exp_avg"] / (1 - BETA_1), two[i]["exp_avg"] / (1 - BETA_1)) for i in one]
    whole = sum(a.square().sum() for a, _ in gradients).sqrt()
    # Float32 sums in another order: 1e-4 of each gradient, where half the batch alone is off by as much as its norm.
    # The second term is for biases before a norm, whose gradient is 0 but for rounding.
    assert [i for i, (a, b) in enumerate(gradients) if (a - b).norm() > 1e-4 * a.norm() + 1e-7 * whole] == []
    # of parameters that float32 sums in another order have moved, where it is the validation's
    for name, tolerance in ((f"train/{metric}", 1e-6), (f"val/{metric}", 1e-4)):
        losses = [toy_run.metrics(folder / run, name)[1] for run in ("one", "two")]
        assert abs(losses[0] - losses[1]) < tolerance * losses[0], name
