"""Faults of saving, of verification and of the retention of checkpoints."""

from __future__ import annotations

from .catchers import RESUME
from .patch import Mutation

MUTATIONS = [
    Mutation(
        "data_rank_missing_in_the_checkpoint",
        "only the first data rank writes its range of the optimizer",
        "engine.checkpoint.save:Saver._write",
        "not tensors",
        "not tensors or self.ctx.data.rank",
        RESUME,
        threads=(
            "NVIDIA-NeMo/Megatron-Bridge#5637",
            "pytorch/torchtitan#811",
        ),
    ),
    Mutation(
        "error_of_the_writing_thread_swallowed",
        "a writer thread fails and the save reports success",
        "engine.checkpoint.save:Saver._write",
        "raise self._write_error(error, temporary / file, wanted) from None",
        'return {"tensors": {}}',
        ("test_a_failed_save_is_an_error_on_all_ranks_and_leaves_the_old_one",),
        threads=("pytorch/pytorch#191391",),
    ),
    Mutation(
        "host_copy_made_once",
        "every background save writes the values of the first one",
        "engine.checkpoint.staging:_copy",
        "copy.flat.copy_(state.flat, non_blocking=True)",
        "if not copy.flat.any():\n    copy.flat.copy_(state.flat)",
        ("test_the_files_are_those_of_a_save_that_waits[tensor]",),
        threads=("NVIDIA-NeMo/RL#3312",),
    ),
    Mutation(
        "digests_not_compared",
        "a flipped bit is loaded silently (torch.load and safetensors verify no checksum)",
        "engine.checkpoint.format:verify_block",
        "part.digests and found != part.digests[block]",
        "not part.digests and found != part.digests[block]",
        ("test_no_damage_loads_silently_and_the_file_is_named",),
        threads=("pytorch/pytorch#126952",),
    ),
    Mutation(
        "old_ones_deleted_unproven",
        "older checkpoints are deleted although the new one cannot be read back",
        "engine.checkpoint.save:Saver._write",
        "self.keep",
        "not self.keep",
        ("test_nothing_is_deleted_when_the_new_one_reads_back_differently",),
    ),
    Mutation(
        "rename_not_synced",
        "a checkpoint reported as saved is lost after a power failure",
        "engine.checkpoint.retention:commit",
        "storage.sync_folder(final.parent)",
        "pass",
        ("test_a_crash_at_any_operation[one more]",),
    ),
    Mutation(
        "half_a_checkpoint_is_the_latest",
        "a folder without its manifest counts as the newest checkpoint",
        "engine.checkpoint.format:newest_step",
        "read_manifest(step_dir(root, step), storage)",
        "pass",
        ("test_latest_is_the_newest_complete_one",),
        threads=("huggingface/transformers#35580", "Lightning-AI/pytorch-lightning#688"),
    ),
]
