//! A text with needles in it, and the questions that ask for them.

use anyhow::{ensure, Result};
use rand::rngs::StdRng;
use rand::seq::index::sample;

use crate::common::tokenizer::Codec;

/// What needles are about: unlike one another, or a small model takes one for the other.
pub const SUBJECTS: [&str; 16] = [
    "special magic number for Lyon",
    "phone number of Captain Bramble",
    "price of the purple umbrella",
    "weight of the golden pumpkin",
    "door code of the old lighthouse",
    "height of Mount Tambola",
    "number of the yellow taxi",
    "population of the village of Ostry",
    "locker number of Professor Quill",
    "room number of the ambassador",
    "age of the giant tortoise",
    "number of elephants in the circus",
    "speed of the silver rocket",
    "year of the Marzipan Festival",
    "length of the Zambezi bridge",
    "bus line to the botanical garden",
];

/// Without it a small model may sum up the text instead of answering.
const INTRODUCTION: &str =
    "Some facts are hidden in the following text. Memorize them: I will ask you about them afterwards.";

/// Of the numbers to be found, all of four digits.
const SECRETS: std::ops::Range<usize> = 1000..10_000;

/// A sentence that a text like this does not contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needle {
    pub subject: &'static str,
    pub secret: usize,
}

impl Needle {
    /// So many, about different subjects and with different numbers.
    pub fn draw(count: usize, rng: &mut StdRng) -> Vec<Self> {
        let subjects = sample(rng, SUBJECTS.len(), count);
        let secrets = sample(rng, SECRETS.len(), count);
        subjects.iter().zip(secrets).map(|(i, s)| Self { subject: SUBJECTS[i], secret: SECRETS.start + s }).collect()
    }

    fn sentence(&self) -> String {
        format!("The {} is {}.", self.subject, self.secret)
    }

    fn question(&self) -> String {
        format!("What is the {}?", self.subject)
    }

    /// Whether an answer has the number, and not within a longer one.
    pub fn is_in(&self, answer: &str) -> bool {
        let mut numbers = answer.split(|c: char| !c.is_ascii_digit());
        numbers.any(|number| number == self.secret.to_string())
    }
}

/// A text to hide needles in.
pub struct Haystack<'a> {
    text: &'a str,
    /// Where sentences begin, and the end.
    bounds: Vec<usize>,
}

/// Needles in a haystack, and a prompt to ask for each.
#[derive(Debug)]
pub struct Hidden {
    pub needles: Vec<Needle>,
    /// Tokens, the chat template's included.
    pub prompts: Vec<Vec<u32>>,
    /// Bytes of the haystack before the needles, and all.
    pub before: usize,
    pub all: usize,
}

impl<'a> Haystack<'a> {
    pub fn new(text: &'a str) -> Self {
        let mut bounds = vec![0];
        let mut rest = text.char_indices().peekable();
        let mut last = ' ';
        while let Some((_, c)) = rest.next() {
            let ended = ['.', '?', '!'].contains(&last) && c.is_whitespace() || (last, c) == ('\n', '\n');
            last = c;
            if ended {
                while rest.next_if(|(_, c)| c.is_whitespace()).is_some() {}
                bounds.extend(rest.peek().map(|(start, _)| *start));
            }
        }
        bounds.push(text.len());
        Self { text, bounds }
    }

    /// Hides `needles` in as many sentences as fit into prompts of `length` tokens, at a share `depth` of them.
    pub fn hide(&self, codec: &Codec, needles: Vec<Needle>, length: usize, depth: f64) -> Result<Hidden> {
        let encode = |sentences| -> Result<Vec<Vec<u32>>> {
            needles.iter().map(|needle| codec.encode(&self.prompt(&needles, needle, sentences, depth))).collect()
        };
        let longest = |prompts: &[Vec<u32>]| prompts.iter().map(Vec::len).max().unwrap_or(0);
        let (mut fit, mut beyond) = (0, self.bounds.len());
        while beyond - fit > 1 {
            let sentences = (fit + beyond) / 2;
            match longest(&encode(sentences)?) <= length {
                true => fit = sentences,
                false => beyond = sentences,
            }
        }
        let prompts = encode(fit)?;
        let tokens = longest(&prompts);
        ensure!(
            fit > 0,
            "--lengths: expected room for needles, question and a sentence of the text, {} tokens; got {length}",
            longest(&encode(1.min(self.bounds.len() - 1))?)
        );
        ensure!(
            beyond < self.bounds.len(),
            "--text: expected more than {length} tokens, got {tokens}: give a longer --text, or lower --lengths"
        );
        let before = self.place(fit, depth);
        Ok(Hidden { needles, prompts, before, all: self.bounds[fit] })
    }

    /// The beginning of the sentence nearest to a share `depth` of the first `sentences`, or their end.
    fn place(&self, sentences: usize, depth: f64) -> usize {
        let wanted = depth * self.bounds[sentences] as f64;
        let off = |bound: &&usize| (**bound as f64 - wanted).abs();
        self.bounds[..=sentences].iter().min_by(|a, b| off(a).total_cmp(&off(b))).copied().unwrap_or(0)
    }

    fn prompt(&self, needles: &[Needle], asked: &Needle, sentences: usize, depth: f64) -> String {
        let (before, after) = self.text[..self.bounds[sentences]].split_at(self.place(sentences, depth));
        let needles: Vec<_> = needles.iter().map(Needle::sentence).collect();
        let text = format!("{INTRODUCTION}\n\n{before}{} {after}", needles.join(" "));
        format!("{}\n\n{}", text.trim_end(), asked.question())
    }
}
