//! Text to tokens and back.

use std::path::Path;

use anyhow::{bail, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use serde_json::Value as Json;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{PreTokenizerWrapper, Tokenizer};

use crate::common::chat::Format;
use crate::common::config::integer;
use crate::common::source::{read, Checkpoint, Gguf};

/// A model's tokenizer, chat format and ending tokens.
pub struct Codec {
    tokenizer: Tokenizer,
    chat: Format,
    ends: Vec<u32>,
}

impl Codec {
    /// From `tokenizer.json` in the model's directory, or the metadata of a GGUF file without one beside it.
    pub fn new(checkpoint: &mut Checkpoint) -> Result<Self> {
        let parts = match checkpoint {
            Checkpoint::Gguf(gguf) => from_gguf(gguf),
            Checkpoint::Directory(directory) => from_directory(directory),
        };
        let (mut tokenizer, template, mut ends) =
            parts.with_context(|| format!("cannot use the tokenizer of {}", checkpoint.path().display()))?;
        // A file may ask for the truncation and padding of its model's training.
        tokenizer.with_truncation(None).map_err(anyhow::Error::msg)?;
        tokenizer.with_padding(None);
        let chat = Format::detect(&template);
        ends.extend(chat.turn_end().and_then(|token| tokenizer.token_to_id(token)));
        Ok(Self { tokenizer, chat, ends })
    }

    /// The tokens of a prompt, as a turn of the user where the model expects turns.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        self.encode_spelled_out(&self.chat.wrap(prompt), true)
    }

    /// The same in two parts, of which the first can be read before the second is known: a turn that begins with `text`,
    pub fn encode_opening(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_spelled_out(&(self.around().0 + text), true)
    }

    /// and the `text` that ends it.
    pub fn encode_closing(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_spelled_out(&(text.to_string() + &self.around().1), false)
    }

    /// What comes before and after a prompt.
    fn around(&self) -> (String, String) {
        // No text holds it.
        const MARK: &str = "\0";
        let turn = self.chat.wrap(MARK);
        let (before, after) = turn.split_once(MARK).unwrap_or((&turn, ""));
        (before.to_string(), after.to_string())
    }

    /// A chat format spells out its special tokens; the tokenizer adds those of a plain prompt, at its beginning.
    fn encode_spelled_out(&self, text: &str, is_beginning: bool) -> Result<Vec<u32>> {
        let add_special_tokens = is_beginning && self.chat == Format::Plain;
        Ok(self.tokenizer.encode(text, add_special_tokens).map_err(anyhow::Error::msg)?.get_ids().to_vec())
    }

    /// The tokens of a text as it is, behind the token that begins one where the model has that.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, true).map_err(anyhow::Error::msg)?.get_ids().to_vec())
    }

    /// Whether `token` ends the answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Turns tokens into text one by one: `step` gives nothing until a character is complete.
    pub fn stream(&self) -> impl FnMut(u32) -> Result<String> + '_ {
        let mut stream = self.tokenizer.decode_stream(true);
        move |token| Ok(stream.step(token).map_err(anyhow::Error::msg)?.unwrap_or_default())
    }
}

/// Tokenizer, chat template and ending tokens.
type Parts = (Tokenizer, String, Vec<u32>);

fn from_directory(directory: &Path) -> Result<Parts> {
    let json = |name: &str| -> Result<Json> {
        let path = directory.join(name);
        if !path.is_file() {
            return Ok(Json::Null);
        }
        serde_json::from_str(&read(&path)?).with_context(|| format!("cannot parse {name}"))
    };
    let template_file = directory.join("chat_template.jinja");
    let template = match template_file.is_file() {
        true => read(&template_file)?,
        false => template_text(&json("tokenizer_config.json")?["chat_template"]),
    };
    let mut ends = token_ids(&json("generation_config.json")?["eos_token_id"]);
    if ends.is_empty() {
        ends = token_ids(&json("config.json")?["eos_token_id"]);
    }
    Ok((from_file(&directory.join("tokenizer.json"))?, template, ends))
}

/// A template, or the default one among several.
fn template_text(template: &Json) -> String {
    let text = match template.as_array() {
        Some(named) => {
            named.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str())
        }
        None => template.as_str(),
    };
    text.unwrap_or_default().to_string()
}

/// A token, or a list of them.
fn token_ids(ids: &Json) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match ids.as_array() {
        Some(several) => several.iter().filter_map(id).collect(),
        None => id(ids).into_iter().collect(),
    }
}

fn from_file(path: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(path).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
}

fn from_gguf(gguf: &mut Gguf) -> Result<Parts> {
    let beside = gguf.path.with_file_name("tokenizer.json");
    let tokenizer = match beside.is_file() {
        true => from_file(&beside)?,
        false => from_metadata(&mut gguf.content)?,
    };
    let metadata = &gguf.content.metadata;
    let template = metadata.get("tokenizer.chat_template").and_then(|template| template.to_string().ok());
    let mut ends = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        if let Some(id) = metadata.get(key) {
            ends.push(u32::try_from(integer(id)?)?);
        }
    }
    Ok((tokenizer, template.cloned().unwrap_or_default(), ends))
}

/// Candle builds the tokenizer, but knows the pre-tokenizers of few models and takes GPT-2's for all others. A model
/// would still speak with that one, and badly: only those that are right here pass.
fn from_metadata(content: &mut Content) -> Result<Tokenizer> {
    const INSTEAD: &str = "put the model's tokenizer.json beside it";
    let text = |key: &str| content.metadata.get(key).and_then(|value| value.to_string().ok()).cloned();
    let kind = text("tokenizer.ggml.model").unwrap_or_default();
    let pre = text("tokenizer.ggml.pre").unwrap_or_default();
    if kind != "gpt2" {
        bail!("its kind {kind:?} is not supported: {INSTEAD}");
    }
    let byte_level = ByteLevel::new(false, true, true);
    let pre_tokenizer: Option<PreTokenizerWrapper> = match pre.as_str() {
        "smollm" => Some(Sequence::new(vec![Digits::new(true).into(), byte_level.into()]).into()),
        "gpt-2" => Some(byte_level.into()),
        "qwen2" => None,
        "llama-bpe" => {
            // What the name implies, under Candle's name and keys.
            content.metadata.insert("tokenizer.ggml.pre".into(), Value::String("llama3".into()));
            content.metadata.insert("tokenizer.ggml.ignore_merges".into(), Value::Bool(true));
            content.metadata.entry("tokenizer.ggml.add_bos_token".into()).or_insert(Value::Bool(true));
            None
        }
        other => bail!("its pre-tokenizer {other:?} is not supported: {INSTEAD}"),
    };
    let mut tokenizer = Tokenizer::from_gguf(content)?;
    if pre_tokenizer.is_some() {
        tokenizer.with_pre_tokenizer(pre_tokenizer);
    }
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::smollm2;
    use crate::common::testing::*;

    /// The codec of a tiny GGUF file whose metadata has these changes.
    fn gguf(pre: &str, changes: &[(&str, Value)], beside: bool) -> Result<Codec> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        if beside {
            write_directory(directory.path(), "llama", &config, &Tensors::new(), 1)?;
        }
        let mut metadata = gguf_metadata("llama", &config, pre);
        metadata.retain(|(key, _)| !changes.iter().any(|(changed, _)| key == changed));
        metadata.extend(changes.iter().map(|(key, value)| (key.to_string(), value.clone())));
        let file = directory.path().join("tiny.gguf");
        write_gguf(&file, "llama", &config, &Tensors::new(), &metadata)?;
        Codec::new(&mut Checkpoint::open(file.to_str().unwrap())?)
    }

    fn directory(files: &[(&str, &str)]) -> Result<Codec> {
        let directory = tempfile::tempdir()?;
        write_directory(directory.path(), "llama", &tiny_config(), &Tensors::new(), 1)?;
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text)?;
        }
        Codec::new(&mut Checkpoint::open(directory.path().to_str().unwrap())?)
    }

    fn decoded(codec: &Codec, tokens: &[u32]) -> Result<Vec<String>> {
        let mut stream = codec.stream();
        tokens.iter().map(|&token| stream(token)).collect()
    }

    #[test]
    fn streams_whole_characters_only() -> Result<()> {
        for codec in [gguf("smollm", &[], false)?, directory(&[])?] {
            let text = "Crab 🦀 and héhé, 12 ½!";
            let tokens = codec.encode(text)?;
            let pieces = decoded(&codec, &tokens)?;
            assert_eq!(pieces.concat(), text);
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
            // The crab's four bytes are four tokens here, and come with the last of them.
            assert!(pieces.contains(&"🦀".to_string()) && pieces.iter().filter(|piece| piece.is_empty()).count() >= 3);
            // Half a character at the end is not shown.
            assert_eq!(decoded(&codec, &tokens[..6])?.concat(), "Crab ");
        }
        Ok(())
    }

    #[test]
    fn gguf_pre_tokenizers_split_as_the_models_do() -> Result<()> {
        let tokens = |codec: Codec| -> Result<Vec<String>> {
            let tokens = codec.encode("he 12")?;
            Ok(tokens.iter().map(|&token| vocabulary()[token as usize].clone()).collect())
        };
        // Digits one by one, and no space before the first word.
        assert_eq!(tokens(gguf("smollm", &[], false)?)?, ["he", "Ġ", "1", "2"]);
        assert_eq!(tokens(gguf("qwen2", &[], false)?)?, ["he", "Ġ", "1", "2"]);
        assert_eq!(tokens(gguf("gpt-2", &[], false)?)?, ["he", "Ġ", "12"]);
        // Llama 3 begins a text with a token of its own: here the second.
        assert_eq!(tokens(gguf("llama-bpe", &[], false)?)?, ["<|im_start|>", "he", "Ġ", "12"]);
        Ok(())
    }

    #[test]
    fn other_gguf_tokenizers_ask_for_a_file_beside() -> Result<()> {
        for (pre, kind) in [("tekken", "gpt2"), ("", "gpt2"), ("default", "llama")] {
            let kind = [("tokenizer.ggml.model", Value::String(kind.into()))];
            let error = format!("{:#}", gguf(pre, &kind, false).err().unwrap());
            assert!(error.contains("put the model's tokenizer.json beside it"), "{error}");
            assert_eq!(gguf(pre, &kind, true)?.encode("he")?.len(), 1);
        }
        Ok(())
    }

    #[test]
    fn chat_formats_come_from_either_source() -> Result<()> {
        let template = "{{ '<|im_start|>' + role }}";
        let from_gguf = gguf("smollm", &[("tokenizer.chat_template", Value::String(template.into()))], false)?;
        let config = serde_json::json!({ "chat_template": template });
        let several = serde_json::json!({ "chat_template": [
            { "name": "rag", "template": "" },
            { "name": "default", "template": template },
        ] });
        let codecs = [
            from_gguf,
            directory(&[("tokenizer_config.json", &config.to_string())])?,
            directory(&[("tokenizer_config.json", &several.to_string())])?,
            directory(&[("chat_template.jinja", template)])?,
        ];
        let id = |text: &str| vocabulary().iter().position(|token| token == text).unwrap() as u32;
        for codec in codecs {
            let tokens = codec.encode("he")?;
            assert_eq!((tokens[0], tokens.contains(&id("he"))), (id("<|im_start|>"), true));
            assert!(codec.is_end(id("<|im_end|>")) && codec.is_end(id("<|endoftext|>")) && !codec.is_end(id("he")));
        }
        assert_eq!(directory(&[])?.encode("he")?, [id("he")]);
        Ok(())
    }

    #[test]
    fn ends_come_from_the_generation_config_first() -> Result<()> {
        let codec = directory(&[("generation_config.json", r#"{"eos_token_id": [5, 6]}"#)])?;
        assert!(codec.is_end(5) && codec.is_end(6) && !codec.is_end(0));
        assert!(directory(&[("generation_config.json", "{}")])?.is_end(0));
        assert!(directory(&[("generation_config.json", "{")]).is_err());
        Ok(())
    }

    #[test]
    fn the_bundled_prompt_is_long_enough() -> Result<()> {
        let Some(file) = smollm2::cached().ok().filter(|file| file.is_file()) else {
            eprintln!("skipped: run the example once to fetch the model");
            return Ok(());
        };
        let codec = Codec::new(&mut Checkpoint::open(file.to_str().unwrap())?)?;
        let tokens = codec.encode(include_str!("../generate/prompt.txt"))?.len();
        assert!((6_000..=6_700).contains(&tokens), "{tokens} tokens");
        Ok(())
    }
}
