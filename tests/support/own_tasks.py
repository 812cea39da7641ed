"""A folder of lm-eval task files as a user writes them, each with its own small data set beside it."""

import json

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/{name}.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: ["no", "yes", "perhaps so"]
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
SUMS = """
task: own_sums
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/own_sums.jsonl}}
training_split: train
fewshot_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Q:", "."], do_sample: false, max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
filter_list:
  - name: whole
    filter: [{{function: take_first}}]
  - name: flexible
    filter: [{{function: regex, regex_pattern: "([a-z]+)", group_select: -1}}, {{function: take_first}}]
"""
PAGES = """
task: own_pages
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/own_pages.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
GROUP = """
group: own_group
task: [own_small, own_large]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""
SENTENCES = [
    *("Did the ships wait in the harbor?", "Was the wind calm in the morning?", "Who paid in grain?"),
    *("Did the council vote a new tax?", "Nobody knew.", "Did Mr. Smith write that the farmers had given more?"),
    *("Was the debate long?", "Did children run ahead of their parents?", "Was the sky clear at last?"),
]


def write_own_tasks(folder):
    """Write tasks `own_small`, `own_large` (group `own_group`), `own_sums` (generation, two filters), `own_pages`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": text, "answer": f"the {i}", "label": i % 3} for i, text in enumerate(SENTENCES)]
    parts = {"train": rows[6:], "own_small": rows[:3], "own_large": rows[1:8], "own_sums": rows[:5], "own_pages": rows}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name in ("own_small", "own_large"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, folder=folder))
    (folder / "own_sums.yaml").write_text(SUMS.format(folder=folder))
    (folder / "own_pages.yaml").write_text(PAGES.format(folder=folder))
    (folder / "own_group.yaml").write_text(GROUP)
    return folder
