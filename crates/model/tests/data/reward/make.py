"""Writes the tiny reward model of this folder and what transformers computes with it.

    pip install torch transformers
    python make.py

`expected.json` holds conversations and plain texts: the token ids that transformers makes of them
and the scores it reads, plus bare id sequences, among them one that ends in padding.
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

HERE = Path(__file__).parent


def letters():
    """The byte-level alphabet of GPT-2, in the order of the letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(plain))]
    return sorted(map(chr, plain + others))


def tokenizer():
    special = ["<|start|>", "<|end|>"]
    vocab = {letter: i for i, letter in enumerate(letters())}
    vocab |= {token: 256 + i for i, token in enumerate(special)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {"id": vocab[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for t in special
    ]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": vocab, "merges": []}
    start = [{"SpecialToken": {"id": special[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": start, "pair": start,
            "special_tokens": {special[0]: {"id": special[0], "ids": [256], "tokens": [special[0]]}}}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
               "normalizer": None, "pre_tokenizer": level, "post_processor": post, "decoder": level,
               "model": model}
    (HERE / "tokenizer.json").write_text(json.dumps(content))
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0],
                "eos_token": special[1], "chat_template": template}
    (HERE / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main():
    tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.25, num_labels=1, bos_token_id=256, eos_token_id=257,
        pad_token_id=257,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(HERE)
    (HERE / "model.safetensors").chmod(0o644)
    text = AutoTokenizer.from_pretrained(HERE)

    def entry(ids, **more):
        with torch.no_grad():
            score = model(torch.tensor([ids])).logits
        return {**more, "ids": ids, "score": score.double().item()}

    ask = [{"role": "user", "content": "Name a prime."}]
    system = [{"role": "system", "content": "Be brief."}, *ask]
    chats = [(ask, "Seven."), (system, "Seven."), (ask, " It is 8 \n"), (ask, ""), (ask, "é 日")]
    plain = [("2 + 2 = ", "4"), ("2 + 2 = ", "5"), ("", "alone")]
    random = torch.randint(0, 256, (3, 120), generator=torch.Generator().manual_seed(1)).tolist()
    bare = [[5], random[0], random[1][:17], [*random[2], 257, 257], [257, 257]]

    def render(messages, answer):
        messages = [*messages, {"role": "assistant", "content": answer}]
        rendered = text.apply_chat_template(messages, tokenize=False)
        return text(rendered, add_special_tokens=False)["input_ids"]

    expected = {
        "chats": [entry(render(m, a), messages=m, answer=a) for m, a in chats],
        "plain": [entry(text(p + a)["input_ids"], prompt=p, answer=a) for p, a in plain],
        "bare": [entry(ids) for ids in bare],
    }
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n")


main()
