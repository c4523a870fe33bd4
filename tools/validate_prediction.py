"""Errors of predicted rounds against measured ones, on the ranks at hand.

    mpirun -n 2 python tools/validate_prediction.py backends=[mpi,gloo] models=[mlp,cnn,resnet20]
    torchrun --nproc-per-node 4 tools/validate_prediction.py

backends=[...]  backends of torch.distributed (default: the launcher's)
models=[...]    networks (default [mlp,cnn,resnet20])
repeats=N       counted rounds of each kind, alternating (default 9)

All other words are options of the job.  Every rank has one client with random samples.  The tool
first fits the network as tools/fit_network.py does, with at most 5 repeats.  Then it alternates two
kinds of rounds: all ranks train alone at the same time, which gives the time of a step; and fedtan,
fedavg and centralised rounds, which it predicts.  Prints JSON, and a table on standard error.
"""

from collections.abc import Sequence

from bench import benchmark
from fedtan_hpc.config.errors import ConfigError, format_option_error
from fedtan_hpc.config.schema import Config
from fedtan_hpc.config.validate import check
from fedtan_hpc.reporting import options
from fedtan_hpc.runtime import launcher_env

OPTIONS = ("backends", "models", "repeats")
_DEFAULTS = ["data=synthetic", "data.shape=[3,32,32]"]
_COLUMNS = {
    "model": "{model}",
    "backend": "{backend}",
    "method": "{method}",
    "predicted, ms": "{predicted_ms:.1f}",
    "measured, ms": "{measured_ms:.1f}",
    "error, %": "{error:+.1%}",
    "waiting": "{terms_ms[waiting]:.1f}",
}


def run(words: Sequence[str]) -> None:
    """Fits, times, compares and prints."""
    tool_options, job_words = options.split(words, OPTIONS)
    backends, repeats = benchmark.backends(tool_options), benchmark.repeats(tool_options, 9)
    configs = configs_of(tool_options.get("models", "models=[mlp,cnn,resnet20]"), job_words)
    from scaling import validation  # torch loads here

    results = validation.validate(configs, backends, repeats)
    if launcher_env.rank_hint() == 0:
        benchmark.print_table(results, _COLUMNS)
        setting = benchmark.setting(
            configs[0],
            shape=list(configs[0].data.info().shape),
            batch_size=configs[0].batch_size,
            local_steps=configs[0].local_steps,
            repeats=repeats,
        )
        benchmark.print_json(setting, results)


def configs_of(models: str, job_words: Sequence[str]) -> list[Config]:
    """Returns a job for each network in ``models=[...]``; raises ``ConfigError``."""
    for word in job_words:
        option, _, value = word.lstrip("+").partition("=")
        if option in ("model", "clients") or option.partition(".")[0] == "algorithm":
            allowed, remedy = (
                "no value (this tool sets it)",
                "leave it out; models=[...] names networks",
            )
            raise ConfigError(format_option_error(option, value, allowed, remedy))
    ranks, configs = launcher_env.detect().world_size, []
    for name in options.values(models, "[mlp,cnn]"):
        words = [*_DEFAULTS, *job_words, f"model={name}", f"clients={ranks}"]
        configs.append(options.composed(words))
        check(configs[-1])
    return configs


if __name__ == "__main__":
    benchmark.main("validate_prediction", __doc__, run)
