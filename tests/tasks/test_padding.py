from __future__ import annotations

import torch
from torch import nn

import ray_nascomp as nc
from ray_nascomp.tasks.data import Data
from ray_nascomp.tasks.padding import batches_of_similar_length, sequence_lengths, without_padding

MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
IDS = torch.arange(1, 19).reshape(3, 6) * MASK


class MeanOfTokens(nn.Module):
    """Averages what the mask keeps, or all of it."""

    def __init__(self, reads_mask: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 3)
        self.reads_mask = reads_mask

    def forward(self, input_ids, attention_mask):
        weights = attention_mask.unsqueeze(-1) if self.reads_mask else torch.ones_like(input_ids).unsqueeze(-1)
        return self.head((self.embedding(input_ids) * weights).sum(1) / weights.sum(1))


class EachToken(MeanOfTokens):
    def forward(self, input_ids, attention_mask):
        return self.head(self.embedding(input_ids) * attention_mask.unsqueeze(-1))


def inputs():
    return {"input_ids": IDS, "attention_mask": MASK}


def lengths_seen(task):
    """Shapes of what reaches the model while the validation data is evaluated."""
    seen = []
    with_hook = task.model.register_forward_pre_hook(
        lambda _module, _args, keywords: seen.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    value = task.outputs(task.predict(task.model), task.val_data)[0]
    with_hook.remove()
    return seen, value


def test_columns_of_padding_alone_are_cut_off():
    assert sequence_lengths(inputs()).tolist() == [3, 1, 4]
    cut = without_padding(inputs())
    assert torch.equal(cut["input_ids"], IDS[:, :4])
    assert torch.equal(cut["attention_mask"], MASK[:, :4])


def test_inputs_that_are_not_sequences_of_tokens_stay_as_they_are():
    for other in ({"values": torch.rand(3, 6)}, {"bias": torch.rand(3, 2)}, {"labels": torch.zeros(3, 4).long()}):
        assert without_padding({**inputs(), **other})["input_ids"].shape == (3, 6)
    assert without_padding(IDS) is IDS


def test_a_model_that_minds_its_mask_sees_no_padding_and_its_outputs_stay_in_order():
    task = nc.Task(MeanOfTokens(), (inputs(), torch.tensor([0, 1, 2])), (inputs(), torch.tensor([0, 1, 2])))
    task.predict(task.model)
    seen, outputs = lengths_seen(task)
    assert seen == [(3, 4)]
    with torch.no_grad():
        assert torch.allclose(outputs, task.model(**inputs()), atol=1e-6)
    assert [batch["input_ids"].shape for batch in task.calibration_inputs(2)] == [(2, 4 if 2 in order(task) else 3)]


def order(task):
    """The two samples that calibration takes first."""
    return torch.randperm(3, generator=torch.Generator().manual_seed(0))[:2].tolist()


def test_a_model_that_reads_padding_or_has_an_output_a_token_gets_all_of_it():
    for model, targets in ((MeanOfTokens(reads_mask=False), torch.zeros(3).long()), (EachToken(), MASK)):
        task = nc.Task(model, (inputs(), targets), (inputs(), targets))
        task.predict(task.model)
        assert lengths_seen(task)[0] == [(3, 6)]


def test_training_batches_hold_samples_of_similar_length_each_of_them_once():
    lengths = torch.randint(1, 41, (400,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < lengths[:, None]).long()
    data = Data(({"input_ids": mask, "attention_mask": mask}, torch.zeros(400, dtype=torch.long)), "data")
    batches = batches_of_similar_length(data, 8, torch.Generator().manual_seed(1))
    assert torch.cat(batches).sort().values.tolist() == list(range(400))
    assert {len(batch) for batch in batches} == {8}
    spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in batches]
    assert max(spread) <= 4
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest != sorted(longest)


def test_tasks_that_mind_padding_train_on_merely_shuffled_batches():
    tasks = [
        nc.Task(model, (inputs(), torch.tensor([0, 1, 2])), (inputs(), torch.tensor([0, 1, 2])), batch_size=1)
        for model in (MeanOfTokens(), MeanOfTokens(reads_mask=False))
    ]
    for task in tasks:
        found = task.epoch_indices(torch.Generator().manual_seed(3))
        assert torch.cat(found).sort().values.tolist() == [0, 1, 2]
    expected = torch.randperm(3, generator=torch.Generator().manual_seed(3))
    assert torch.cat(found).tolist() == expected.tolist()
