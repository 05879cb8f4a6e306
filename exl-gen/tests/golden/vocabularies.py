#!/usr/bin/env python3
"""Trains tiny tokenizers and writes what exl-gen must make of texts with them.

    pip install sentencepiece==0.2.3 transformers==4.57.1 tiktoken==0.14.0 tokenizers==0.22.2 protobuf==7.36.2
    python exl-gen/tests/golden/vocabularies.py

Writes the folder `vocabularies`: model files, and expected.json, which says for each repository of
which files it consists and what SentencePiece, tiktoken or transformers' slow tokenizers make of
every text (`fast` ones decode texts with special tokens). The same bytes on every run. The table of
characters of nmt_nfkc is large, so that model is packed with the command `zstd`.

Kept out, because the Python implementations differ among themselves: special pieces that no file
declares (slow tokenizers take them for text), a special token that is not among the named ones at the
very front of a text (slow tokenizers without `legacy` put a blank before it), and the empty text where
GPT-2's tokenizer puts a blank in front (the slow one makes that blank of nothing).
"""
import base64
import io
import json
import pathlib
import random
import shutil
import subprocess
import tempfile
import unicodedata

import sentencepiece
import tiktoken
import tokenizers as hf
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import (
    CodeLlamaTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    LlamaTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

HERE = pathlib.Path(__file__).parent
OUT = HERE / "vocabularies"
CORPUS = HERE.parents[2] / "exl-quant" / "calibration"
SCRIPTS = {"LATIN", "CYRILLIC", "GREEK", "DEVANAGARI", "HEBREW", "ARABIC"}
LETTERS = bytes_to_unicode()
BYTES = {letter: byte for byte, letter in LETTERS.items()}
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")

TEXTS = [
    "", " ", "  ", "   x", "x   ", " x", "a  b", "\n", "\n\n", " \n ", "\t", "a\tb",
    "The quick brown fox, isn't it? I'LL say we've 1234567 of 3.14159!",
    "    def f(x):\n        return x\n", "\r\n", "a\r\nb\r\r\n", "é", "e\u0301", "x\u0301\u0302\u0303",
    "\u0301", "ﬁne ﬀ", "①②③", "Ａ ｂ", "\u3000x\u3000\u3000y", "\u00a0x\u00a0", "½ ﷺ ǆ ﬃ Å",
    "🦀", "👩‍👩‍👧‍👦 x", "\u0000", "\u0001\u0002a\u007f", "\u200b", "\ufeffx", "a\u200bb", "\ufffd", "\U0010ffff",
    "▁", "▁▁x", "x▁y", " ▁ ", "가각 日本語テキスト。", "नमस्ते दुनिया", "שלום עולם", "مرحبا بالعالم",
    "Привет, мир!", "Γειά σου Κόσμε", "a" * 23, " " * 17, "ab" * 9, "\n" * 7, "!!!???...---", "aaaa bbbb",
    "<unk>", "<0x41>", "<0x0A>", "a<b>bold</b> c", "a<sep>b <sep> <sep><sep>c", "All human beings",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
]
# With special tokens, by what stands in their place.
SPECIAL = ["{bos}a", "{bos} a", "a{eos}", "a{eos}b", "a {eos} b", "{bos}{bos}", "\n{eos}\n", "x{eos}  y {bos}z"]


def corpus():
    """Lines in six scripts, of programs and of books."""
    documents = (CORPUS / "udhr.txt").read_text(encoding="utf-8").split("\n\n")
    lines = []
    for document in documents:
        letters = [unicodedata.name(c, "?").split()[0] for c in document if c.isalpha()]
        if letters and max(set(letters), key=letters.count) in SCRIPTS:
            lines += document.split("\n")
    for name, count in [("code.txt", 1200), ("books.txt", 300)]:
        lines += (CORPUS / name).read_text(encoding="utf-8").split("\n")[:count]
    return lines


LINES = corpus()


def train(kind, size, **more):
    """A SentencePiece model as a message."""
    out = io.BytesIO()
    settings = dict(
        sentence_iterator=iter(LINES), model_writer=out, model_type=kind, vocab_size=size, num_threads=1,
        minloglevel=2, max_sentence_length=20000, character_coverage=0.99, **more,
    )
    sentencepiece.SentencePieceTrainer.train(**settings)
    model = model_pb2.ModelProto()
    model.ParseFromString(out.getvalue())
    return model


def models():
    plain = dict(normalization_rule_name="identity", remove_extra_whitespaces=False,
                 allow_whitespace_only_pieces=True, split_digits=True, byte_fallback=True)
    yield "bpe", train("bpe", 760, **plain)
    names = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>")
    symbols = ["\n\n", "▁▁", "<start_of_turn>", "<end_of_turn>", "<b>", "</b>", "aa"]
    yield "gemma", train("bpe", 700, add_dummy_prefix=False, user_defined_symbols=symbols, **names, **plain)
    yield "nmt", train("unigram", 600)
    fallback = train("unigram", 700, add_dummy_prefix=False, user_defined_symbols=["<sep>", "aa", "▁▁"],
                     control_symbols=["<ctl>"], **plain)
    for number, piece in enumerate(fallback.pieces):
        # Ties, and pieces that only other tools use.
        if piece.type == 1:
            piece.score = round(piece.score)
            if number % 7 == 0 and len(piece.piece) > 1:
                piece.type = 5
    yield "fallback", fallback
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        for key, value in [("ﬁ", "fi"), ("e\u0301", "é"), ("x\u0301", "X"), ("\t", " "), ("\u3000", " "),
                           ("\u200b", ""), ("x\u0301\u0302\u0303", "Z"), ("①", "(1)"), ("\n", " ")]:
            points = ["%04X" % ord(c) for c in key], ["%04X" % ord(c) for c in value]
            rules.write(" ".join(points[0]) + "\t" + " ".join(points[1]) + "\n")
        rules.flush()
        model = train("bpe", 520, normalization_rule_tsv=rules.name, user_defined_symbols=["<sep>", "ﬀ"],
                      treat_whitespace_as_suffix=True)
    model.normalizer_spec.ClearField("normalization_rule_tsv")
    for number, piece in enumerate(model.pieces):
        if piece.type == 1:
            piece.score = -float(number // 30)
            if number % 3 == 0 and len(piece.piece) > 1:
                piece.type = 5
    yield "rules", model


def byte_level(size):
    """Vocabulary and pairs of a byte-level BPE."""
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(CL100K), "isolated"),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = hf.trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(BYTES), show_progress=False)
    model.train_from_iterator(LINES, trainer)
    model = json.loads(model.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return model["vocab"], pairs


class Repository:
    """A folder, and what it must make of texts."""

    def __init__(self, name, files, **json_files):
        self.name, self.files, self.json_files = name, files, json_files
        self.folder = pathlib.Path(tempfile.mkdtemp())
        for target, source in files.items():
            path = OUT / source
            if path.suffix == ".zst":
                (self.folder / target).write_bytes(subprocess.run(
                    ["zstd", "-d", "-c", path], check=True, capture_output=True).stdout)
            else:
                shutil.copy(path, self.folder / target)
        for stem, content in json_files.items():
            (self.folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
        self.expected = {"name": name, "files": files, "json": json_files}
        self.random = random.Random(name)

    def special(self, encode, texts, decode=None):
        """Ids of texts in which special tokens count, with what is put around them."""
        ids = [encode(text) for text in texts]
        self.expected["special"] = list(zip(texts, ids))
        if decode:
            self.expected["shown"] = [decode(i, False) for i in ids]
            self.expected["skipped"] = [decode(i, True) for i in ids]
        return self.expected

    def plain(self, encode, decode, random_ids, texts=TEXTS):
        """Ids of texts as they stand, and what these and any others decode to."""
        ids = [encode(text) for text in texts]
        self.expected["plain"] = list(zip(texts, ids, map(decode, ids)))
        some = [random_ids(self.random) for _ in range(12)]
        self.expected["random"] = list(zip(some, map(decode, some)))
        return self.expected

    def sentencepiece(self):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))
        unknown = pieces.unk_id()

        def some(source):
            ids = [source.randrange(pieces.get_piece_size()) for _ in range(source.randrange(1, 10))]
            return [i for i in ids if i != unknown and not pieces.id_to_piece(i) == "<0x20>"]

        # What stands for unknown text is special to exl-gen, and shows nothing.
        def decode(ids):
            return pieces.decode([i for i in ids if i != unknown])

        return self.plain(pieces.encode, decode, some)

    def transformers(self, kind, texts, fast=None):
        slow = kind.from_pretrained(self.folder)
        decode = fast and fast.from_pretrained(self.folder, from_slow=True)
        show = decode and (lambda ids, skip: decode.decode(ids, skip_special_tokens=skip))
        return self.special(slow.encode, texts, show)


def fill(texts, bos, eos):
    return [text.replace("{bos}", bos).replace("{eos}", eos) for text in texts]


def token(content, **more):
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    return {"content": content, **flags, **more}


def from_sentencepiece():
    bpe, texts = {"tokenizer.model": "bpe.model"}, TEXTS + fill(SPECIAL, "<s>", "</s>")
    for legacy in [True, False]:
        config = dict(tokenizer_class="LlamaTokenizer", legacy=legacy, add_eos_token=not legacy)
        made = Repository(f"llama legacy={legacy}", bpe, tokenizer_config=config)
        made.transformers(LlamaTokenizer, texts, LlamaTokenizerFast)
        yield made.sentencepiece() if legacy else made.expected
    config = dict(tokenizer_class="LlamaTokenizer", legacy=False, add_prefix_space=False, add_bos_token=False)
    yield Repository("llama without a blank", bpe, tokenizer_config=config).transformers(LlamaTokenizer, texts)
    config = dict.fromkeys([f"{k}_token" for k in ["prefix", "middle", "suffix", "eot", "fill"]])
    config["tokenizer_class"] = "CodeLlamaTokenizer"
    yield Repository("code llama", bpe, tokenizer_config=config).transformers(CodeLlamaTokenizer, texts)
    config = dict(
        tokenizer_class="LlamaTokenizerFast", pad_token="[PAD]",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        added_tokens_decoder={
            "0": token("<unk>"), "1": token("<s>"), "2": token("</s>"), "760": token("<|im_start|>"),
            "761": token("<|im_end|>"), "762": token("<tool>", special=False),
            "763": token("<trim>", lstrip=True, rstrip=True),
        },
    )
    made = Repository("llama with added tokens", bpe, tokenizer_config=config)
    yield made.transformers(LlamaTokenizer, texts + [
        "<|im_start|>user\nhi<|im_end|>\n", "x <|im_start|> y", "a <tool> b", "a<tool>b", "a  <trim>  b",
        "a [PAD]", "a<tool><trim> <|im_end|>",
    ])
    made = Repository(
        "llama with old files", bpe, tokenizer_config={"tokenizer_class": "LlamaTokenizer"},
        added_tokens={"<|im_start|>": 760, "<tool>": 761},
        special_tokens_map={"bos_token": "<s>", "eos_token": token("</s>"), "pad_token": "<|im_start|>"},
    )
    yield made.transformers(LlamaTokenizer, texts + ["a<|im_start|>b", "a <tool> b"])
    made = Repository("gemma", {"tokenizer.model": "gemma.model"}, config={"model_type": "gemma"},
                      tokenizer_config={"tokenizer_class": "GemmaTokenizer"})
    turns = ["<start_of_turn>user\nhi<end_of_turn>\n", "a<end_of_turn> b"]
    made.transformers(GemmaTokenizer, TEXTS + fill(SPECIAL, "<bos>", "<eos>") + turns)
    yield made.sentencepiece()
    nmt = {"tokenizer.model": "nmt.model.zst"}
    yield Repository("nmt", nmt).sentencepiece()
    config = dict(tokenizer_class="LlamaTokenizer", legacy=False)
    yield Repository("nmt legacy=False", nmt, tokenizer_config=config).transformers(LlamaTokenizer, texts)
    for name in ["fallback", "rules"]:
        yield Repository(name, {"tokenizer.model": f"{name}.model"}).sentencepiece()


def from_ranks(vocab):
    ranks = {bytes(BYTES[letter] for letter in word): rank for word, rank in vocab.items()}
    size = len(ranks)
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{n}|>" for n in range(205)]
    llama = [f"<|reserved_special_token_{n}|>" for n in range(251)]
    for place, name in [(0, "<|begin_of_text|>"), (1, "<|end_of_text|>"), (6, "<|start_header_id|>"),
                        (7, "<|end_header_id|>"), (9, "<|eot_id|>")]:
        llama.insert(place, name)
    gpt4 = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    gpt4 = {name: size + 1 + n for n, name in enumerate(gpt4)}
    more = ["<|endofprompt|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    gpt4.update({name: size + 20 + n for n, name in enumerate(more)})
    cases = [
        ("qwen", "qwen.tiktoken", {"tokenizer_class": "QWenTokenizer"}, {"model_type": "qwen"}, QWEN,
         {name: size + n for n, name in enumerate(qwen)}, [], "<|im_start|>", "<|im_end|>"),
        ("llama 3", "tokenizer.model", {}, {"model_type": "llama"}, CL100K,
         {name: size + n for n, name in enumerate(llama)}, [size], "<|begin_of_text|>", "<|eot_id|>"),
        ("dbrx", "cl100k_base.tiktoken",
         {"tokenizer_class": "TiktokenTokenizerWrapper", "pad_token": "<|pad|>",
          "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
         {"model_type": "dbrx"}, CL100K, gpt4, [], "<|im_start|>", "<|endoftext|>"),
    ]
    for name, file, tokenizer_config, config, pattern, special, front, bos, eos in cases:
        made = Repository(name, {file: "ranks.tiktoken"}, tokenizer_config=tokenizer_config, config=config)
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        # Both Qwen's code and its successors compose characters first.
        clean = (lambda text: unicodedata.normalize("NFC", text)) if pattern == QWEN else str
        made.special(lambda text: front + encoding.encode(clean(text), allowed_special="all"),
                     fill(SPECIAL, bos, eos) + ["a<|extra_204|>", "<|reserved_special_token_250|>"])
        yield made.plain(
            lambda text: encoding.encode(clean(text), allowed_special=set(), disallowed_special=()),
            encoding.decode, lambda source: [source.randrange(size) for _ in range(source.randrange(1, 10))])


def from_merges():
    files = {"vocab.json": "vocab.json", "merges.txt": "merges.txt"}
    texts = TEXTS + fill(SPECIAL, "<|endoftext|>", "<|endoftext|>")
    made = Repository("gpt2", files, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    yield made.transformers(GPT2Tokenizer, texts)
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    yield Repository("gpt2 with a blank", files, tokenizer_config=config).transformers(GPT2Tokenizer, TEXTS[1:])
    config = dict(tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token="<|im_end|>",
                  additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    made = Repository("qwen2", files, tokenizer_config=config)
    yield made.transformers(Qwen2Tokenizer, texts + fill(SPECIAL, "<|im_start|>", "<|im_end|>"))
    made = Repository("starcoder", files, config={"model_type": "gpt_bigcode"})
    model = hf.Tokenizer(hf.models.BPE.from_file(*(str(OUT / name) for name in files)))
    model.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Digits(individual_digits=True), hf.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.decoder = hf.decoders.ByteLevel()
    size = model.get_vocab_size() - 1
    yield made.plain(lambda text: model.encode(text).ids, model.decode,
                     lambda source: [source.randrange(size) for _ in range(source.randrange(1, 10))])


def main():
    OUT.mkdir(exist_ok=True)
    for name, model in models():
        path = OUT / f"{name}.model"
        path.write_bytes(model.SerializeToString(deterministic=True))
        if name == "nmt":
            subprocess.run(["zstd", "-q", "-f", "--ultra", "-22", "--rm", path], check=True)
    vocab, pairs = byte_level(640)
    lines = [(base64.b64encode(bytes(BYTES[c] for c in word)).decode(), rank) for word, rank in vocab.items()]
    lines.sort(key=lambda line: line[1])
    (OUT / "ranks.tiktoken").write_text("".join(f"{word} {rank}\n" for word, rank in lines))
    words = {**vocab, "<|endoftext|>": len(vocab)}
    (OUT / "vocab.json").write_text(json.dumps(words, ensure_ascii=False) + "\n", encoding="utf-8")
    (OUT / "merges.txt").write_text("\n".join(["#version: 0.2"] + pairs) + "\n", encoding="utf-8")
    expected = [*from_sentencepiece(), *from_ranks(vocab), *from_merges()]
    text = ",\n".join(json.dumps(case, ensure_ascii=True, separators=(",", ":")) for case in expected)
    (OUT / "expected.json").write_text(f"[\n{text}\n]\n")
    size = sum(path.stat().st_size for path in OUT.iterdir())
    print(f"{len(expected)} repositories, {size} bytes")


main()
