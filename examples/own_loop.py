"""Visual gradient steering in a training loop of one's own: `vgs_kernels` and transformers, no trainer.

    python examples/own_loop.py STUDENT TEACHER ROWS.jsonl OUTPUT_DIR [STEPS]

Student and teacher are vision-language models of one family, rows are in any form that `vgs train` reads.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from vgs_distill import EvidenceTokens, canonical_row, load_rows, with_evidence, without_evidence

from vgs_kernels import LinearDecomposedKL, LMHead, VisualGradientSteering, linear_decomposed_kl, steer_


def model_inputs(processor: Any, rows: list[dict[str, Any]], *, with_image: bool) -> dict[str, Tensor]:
    """The prompts of some rows, padded on the left, with their images or as text alone."""
    messages = [with_evidence(row) if with_image else without_evidence(row["prompt"]) for row in rows]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(messages, **options, processor_kwargs={"padding": True}))


def hidden_states(model: Any, inputs: dict[str, Tensor], completion: Tensor) -> Tensor:
    """The states that predict the completion (rows, tokens), after the given prompts; (rows * tokens, width)."""
    tails = {"input_ids": completion, "attention_mask": torch.ones_like(completion)}
    tails["mm_token_type_ids"] = torch.zeros_like(completion)  # a completion is text
    inputs = {name: torch.cat([value, tails[name]], 1) if name in tails else value for name, value in inputs.items()}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, -completion.size(1) - 1 : -1].flatten(0, 1)


def parts_of_loss(
    student: Any, teacher: Any, processor: Any, rows: list[dict[str, Any]], new_tokens: int, objective: Any = None
) -> LinearDecomposedKL:
    """Sample completions from the student and return the parts of its divergence from the teacher."""
    seen, masked = (model_inputs(processor, rows, with_image=with_image) for with_image in (True, False))
    # An image placeholder in a completion would promise features that do not exist.
    sampling = {
        "do_sample": True,
        "suppress_tokens": EvidenceTokens.of(student.config, processor).banned_while_sampling,
    }
    with torch.no_grad():  # all but the student that sees is constant
        completion = student.generate(**seen, max_new_tokens=new_tokens, **sampling)[:, seen["input_ids"].size(1) :]
        teacher_hidden, masked_teacher_hidden = (hidden_states(teacher, view, completion) for view in (seen, masked))
        masked_student_hidden = hidden_states(student, masked, completion)
    ends = completion == processor.tokenizer.eos_token_id
    counts = (ends.cumsum(1) - ends.long() == 0).flatten().float()  # up to the first end of turn
    return linear_decomposed_kl(
        hidden_states(student, seen, completion),
        LMHead(student.lm_head.weight),
        teacher_hidden,
        LMHead(teacher.lm_head.weight.detach()),
        masked_teacher_hidden,
        masked_student_hidden,
        decomposition="vgs",
        objective=objective,
        token_weights=counts / counts.sum(),
    )


def main(student_name: str, teacher_name: str, dataset: str, output_dir: str, steps: str = "3") -> None:
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(student_name, padding_side="left")
    student = AutoModelForImageTextToText.from_pretrained(student_name)
    teacher = AutoModelForImageTextToText.from_pretrained(teacher_name).eval()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    steering = VisualGradientSteering(gamma=2.0)
    rows = [canonical_row(row) for row in load_rows(dataset, split="train")]
    for step in range(int(steps)):
        batch = [rows[(4 * step + index) % len(rows)] for index in range(4)]
        parts = parts_of_loss(student, teacher, processor, batch, new_tokens=8)
        optimizer.zero_grad()
        steered = steer_(parameters, parts.standard, parts.vis, steering, max_norm=1.0)
        optimizer.step()
        (standard, cross), (_, vis) = steered.gramian
        cosine = cross / (standard * vis).sqrt()
        print(f"step {step + 1}: KL {parts.standard:.4f}, cosine of the two gradients {cosine:.3f}")
    student.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
