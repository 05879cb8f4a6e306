//! What files of ranks or merges leave out: how texts are cut into words, and special tokens.

use serde_json::{Value as Json, json};
use tokenizers::PreTokenizerWrapper;

use super::config::{Defaults, Settings};
use super::invalid;
use crate::Result;

/// Words as GPT-4 has them, with up to three digits each.
const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with one digit each, as Qwen has it.
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const END: &str = "<|endoftext|>";

/// How texts are cut into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Words {
    /// At matches of a regular expression.
    Pattern(&'static str),
    /// As GPT-2 does.
    Gpt2,
    /// Every digit is a word; the rest as GPT-2 does.
    Digits,
}

/// What is common to the models that share a way of writing their vocabularies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    /// Whose it is.
    pub(super) name: &'static str,
    pub(super) words: Words,
    /// Texts are put into composed form (NFC) first.
    pub(super) compose: bool,
    /// Special tokens by name, where tokenizer_config.json has none.
    texts: &'static [(&'static str, &'static str)],
    add_bos: bool,
    specials: Specials,
}

/// Special tokens that the code of a model adds to its ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Specials {
    None,
    Qwen,
    Llama3,
    Cl100k,
    Arcade100k,
}

const QWEN_1: Family = Family {
    name: "Qwen",
    words: Words::Pattern(QWEN),
    compose: true,
    texts: &[("eos_token", END), ("pad_token", END)],
    add_bos: false,
    specials: Specials::Qwen,
};
const LLAMA_3: Family = Family {
    name: "Llama 3",
    words: Words::Pattern(CL100K),
    compose: false,
    texts: &[
        ("bos_token", "<|begin_of_text|>"),
        ("eos_token", "<|end_of_text|>"),
    ],
    add_bos: true,
    specials: Specials::Llama3,
};
const GPT_4: Family = Family {
    name: "GPT-4",
    words: Words::Pattern(CL100K),
    compose: false,
    texts: &[("bos_token", END), ("eos_token", END), ("unk_token", END)],
    add_bos: false,
    specials: Specials::Cl100k,
};
const ARCADE: Family = Family {
    name: "StableLM 2",
    words: Words::Pattern(QWEN),
    compose: true,
    texts: &[("eos_token", END), ("pad_token", END)],
    add_bos: false,
    specials: Specials::Arcade100k,
};
const GPT_2: Family = Family {
    name: "GPT-2",
    words: Words::Gpt2,
    compose: false,
    texts: &[("bos_token", END), ("eos_token", END), ("unk_token", END)],
    add_bos: false,
    specials: Specials::None,
};
const STARCODER: Family = Family {
    name: "StarCoder",
    words: Words::Digits,
    ..GPT_2
};
const QWEN_2: Family = Family {
    name: "Qwen2",
    specials: Specials::None,
    ..QWEN_1
};

impl Family {
    /// Whose ranks these are, by tokenizer_class, then by model_type.
    ///
    /// # Errors
    /// A family that is not known.
    pub(super) fn of_ranks(settings: &Settings) -> Result<Self> {
        let (class, kind) = (settings.class(), settings.model_type());
        let family = match (class, kind) {
            ("QWenTokenizer", _) => Some(QWEN_1),
            ("TiktokenTokenizerWrapper", _) => Some(GPT_4),
            ("Arcade100kTokenizer", _) => Some(ARCADE),
            ("" | "PreTrainedTokenizer", "qwen") => Some(QWEN_1),
            ("" | "PreTrainedTokenizer" | "LlamaTokenizer", "llama" | "mllama") => Some(LLAMA_3),
            ("" | "PreTrainedTokenizer", "dbrx") => Some(GPT_4),
            ("" | "PreTrainedTokenizer", "stablelm" | "stablelm_epoch") => Some(ARCADE),
            _ => None,
        };
        family.ok_or_else(|| {
            unknown(
                settings,
                "QWenTokenizer, TiktokenTokenizerWrapper, Arcade100kTokenizer",
                "qwen, llama, dbrx, stablelm",
            )
        })
    }

    /// Whose vocab.json and merges.txt these are.
    ///
    /// # Errors
    /// A family that is not known.
    pub(super) fn of_merges(settings: &Settings) -> Result<Self> {
        let digits = ["gpt_bigcode", "starcoder2", "granite"];
        let gpt2 = ["gpt2", "gptj", "gpt_neo", "codegen", "phi"];
        let kind = settings.model_type();
        let family = match settings.class() {
            "GPT2Tokenizer" | "" | "PreTrainedTokenizer" if digits.contains(&kind) => {
                Some(STARCODER)
            }
            "GPT2Tokenizer" | "CodeGenTokenizer" => Some(GPT_2),
            "Qwen2Tokenizer" => Some(QWEN_2),
            "" | "PreTrainedTokenizer" if gpt2.contains(&kind) => Some(GPT_2),
            "" | "PreTrainedTokenizer" if kind.starts_with("qwen2") => Some(QWEN_2),
            "" | "PreTrainedTokenizer" if kind.starts_with("qwen3") => Some(QWEN_2),
            _ => None,
        };
        family.ok_or_else(|| {
            unknown(
                settings,
                "GPT2Tokenizer, CodeGenTokenizer, Qwen2Tokenizer",
                "gpt2, gptj, gpt_neo, codegen, phi, gpt_bigcode, starcoder2, granite, qwen2, qwen3",
            )
        })
    }

    /// What is used where the model's files say nothing.
    pub(super) fn defaults(&self) -> Defaults {
        let texts = self.texts.iter();
        Defaults {
            texts: texts.map(|&(name, text)| (name, text.to_owned())).collect(),
            add_bos: self.add_bos,
        }
    }

    /// Cuts texts into words in GPT-2's letters for bytes.
    pub(super) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        let bytes = |use_regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": use_regex})
        };
        let parts = match self.words {
            Words::Pattern(pattern) => vec![
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                    "invert": false}),
                bytes(false),
            ],
            Words::Gpt2 => vec![bytes(true)],
            Words::Digits => vec![
                json!({"type": "Digits", "individual_digits": true}),
                bytes(true),
            ],
        };
        let json = json!({"type": "Sequence", "pretokenizers": Json::from(parts)});
        serde_json::from_value(json).map_err(|error| invalid(error.to_string()))
    }

    /// The special tokens behind `ranks` tokens, with their ids.
    pub(super) fn special_tokens(&self, ranks: u32, settings: &Settings) -> Vec<(u32, String)> {
        let numbered = |start: u32, names: Vec<String>| (ranks + start..).zip(names).collect();
        match self.specials {
            Specials::None => Vec::new(),
            Specials::Qwen => {
                let names = [END, "<|im_start|>", "<|im_end|>"].map(str::to_owned);
                let extra = (0..205).map(|n| format!("<|extra_{n}|>"));
                numbered(0, names.into_iter().chain(extra).collect())
            }
            Specials::Llama3 => numbered(0, llama_3(settings)),
            // One number stays free behind the ranks.
            Specials::Cl100k => [
                (1, END),
                (2, "<|fim_prefix|>"),
                (3, "<|fim_middle|>"),
                (4, "<|fim_suffix|>"),
                (20, "<|endofprompt|>"),
            ]
            .map(|(at, name)| (ranks + at, name.to_owned()))
            .to_vec(),
            Specials::Arcade100k => numbered(1, arcade_100k()),
        }
    }
}

/// 256 tokens. From 3.1 on some of the reserved ones have names; such models scale their rotation
/// in a way of their own.
fn llama_3(settings: &Settings) -> Vec<String> {
    let scaling = &settings.model["rope_scaling"];
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str());
    let named: &[(usize, &str)] = match kind {
        Some("llama3") => &[
            (0, "<|begin_of_text|>"),
            (1, "<|end_of_text|>"),
            (4, "<|finetune_right_pad_id|>"),
            (6, "<|start_header_id|>"),
            (7, "<|end_header_id|>"),
            (8, "<|eom_id|>"),
            (9, "<|eot_id|>"),
            (10, "<|python_tag|>"),
        ],
        _ => &[
            (0, "<|begin_of_text|>"),
            (1, "<|end_of_text|>"),
            (6, "<|start_header_id|>"),
            (7, "<|end_header_id|>"),
            (9, "<|eot_id|>"),
        ],
    };
    let mut reserved = 0;
    let name = |at: usize| match named.iter().find(|&&(place, _)| place == at) {
        Some(&(_, name)) => name.to_owned(),
        None => {
            reserved += 1;
            format!("<|reserved_special_token_{}|>", reserved - 1)
        }
    };
    (0..256).map(name).collect()
}

fn arcade_100k() -> Vec<String> {
    let names = [
        END,
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<gh_stars>",
        "<filename>",
        "<issue_start>",
        "<issue_comment>",
        "<issue_closed>",
        "<jupyter_start>",
        "<jupyter_text>",
        "<jupyter_code>",
        "<jupyter_output>",
        "<empty_output>",
        "<commit_before>",
        "<commit_msg>",
        "<commit_after>",
        "<reponame>",
        "<|endofprompt|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|pause|>",
    ];
    let registers = (0..8).map(|n| format!("<|reg{n}|>"));
    let names = names.iter().map(|&name| name.to_owned());
    names
        .chain(registers)
        .chain(["<|extra0|>".to_owned()])
        .collect()
}

fn unknown(settings: &Settings, classes: &str, kinds: &str) -> crate::Error {
    let found = |name: &str| match name {
        "" => "missing".to_owned(),
        name => format!("`{name}`"),
    };
    invalid(format!(
        "it does not say how texts are cut into words, and whose it is is not known: tokenizer_class \
         of tokenizer_config.json is {} (known: {classes}), model_type of config.json is {} (known: \
         {kinds}); put a tokenizer.json beside it",
        found(settings.class()),
        found(settings.model_type()),
    ))
}
