"""The commands that make a smaller model: `prune` and `score`."""

from functools import partial

from hifiprune.cli.console import show
from hifiprune.cli.flags import with_config
from hifiprune.cli.options import Model, Output
from hifiprune.config.prune import PruneConfig, ScoreConfig
from hifiprune.io.atomic import local_path


@with_config
def prune(model: Model, output: Output, config: PruneConfig, *, as_json: bool) -> None:
    """Prune a checkpoint: remove the least important MLP neurons, and repair the rest."""
    import hifiprune as hp
    from hifiprune.cli import tables

    record = hp.prune(model, output, config)
    told = partial(tables.foreseen, record) if config.dry_run else partial(tables.pruned, record, local_path(output))
    show(record.to_dict(), as_json, told)


@with_config
def score(model: Model, output: Output, config: ScoreConfig, *, as_json: bool) -> None:
    """Score every neuron once; then prune at any ratio in seconds."""
    import hifiprune as hp
    from hifiprune.cli import tables

    record = hp.score_checkpoint(model, output, config)
    told = partial(tables.foreseen, record)
    if not config.dry_run:
        told = partial(tables.scored, record, model, local_path(output))
    show(record.to_dict(), as_json, told)
