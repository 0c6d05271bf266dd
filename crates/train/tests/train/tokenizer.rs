//! Training a tokenizer.

use std::fs;
use std::sync::atomic::AtomicBool;

use tercet_train::config::DataConfig;
use tercet_train::data::Corpus;
use tercet_train::tokenizer_train::{SAMPLE_BYTES, train};

use crate::common::write_corpus;

fn corpus(text: Option<&str>) -> (tempfile::TempDir, Corpus) {
    let room = tempfile::tempdir().unwrap();
    match text {
        Some(text) => fs::write(room.path().join("a.txt"), text).unwrap(),
        None => write_corpus(room.path()),
    }
    let paths = vec![room.path().display().to_string()];
    let data = DataConfig { paths, ..DataConfig::default() };
    let corpus = Corpus::scan(&data, &AtomicBool::new(false)).unwrap();
    (room, corpus)
}

#[test]
fn every_text_comes_back_and_documents_begin_with_the_mark() {
    let (_room, corpus) = corpus(None);
    let json = train(&corpus, 290, &["<|user|>".into()], SAMPLE_BYTES).unwrap();
    let tokenizer = tercet_model::Tokenizer::from_bytes(json.as_bytes()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 290);
    assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(0));
    assert_eq!(tokenizer.token_id("<|user|>"), Some(1));
    for text in ["let value_3 = step(4, 5);", "  \t\r\n", "Grüße, 世界 🦀", "\u{0}\u{7f}"] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        let marked = tokenizer.encode(text, true).unwrap();
        assert_eq!((marked[0], &marked[1..]), (0, &ids[..]));
    }
    assert_eq!(tokenizer.encode("", true).unwrap(), [0]);
}

#[test]
fn training_twice_gives_the_same_file() {
    // Hash maps are seeded anew for each, so that an order taken from one would show.
    let (_room, corpus) = corpus(None);
    let first = train(&corpus, 300, &[], SAMPLE_BYTES).unwrap();
    for _ in 0..5 {
        assert_eq!(train(&corpus, 300, &[], SAMPLE_BYTES).unwrap(), first);
    }
    let few_threads = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(few_threads.install(|| train(&corpus, 300, &[], SAMPLE_BYTES)).unwrap(), first);
}

#[test]
fn a_vocabulary_that_does_not_fit_is_refused_with_one_that_does() {
    let (_room, small) = corpus(Some("aa bb aa bb"));
    let text = train(&small, 5000, &[], SAMPLE_BYTES).unwrap_err().to_string();
    assert!(text.contains("supports only") && text.contains("fewer than the 5000"), "{text}");
    let text = train(&small, 100, &[], SAMPLE_BYTES).unwrap_err().to_string();
    assert!(text.contains("use at least 257"), "{text}");
    let special = ["<a>".to_owned(), "<a>".to_owned()];
    let text = train(&small, 300, &special, SAMPLE_BYTES).unwrap_err().to_string();
    assert!(text.contains("`<a>`") && text.contains("repeat"), "{text}");
}

#[test]
fn a_small_sample_is_taken_from_the_whole_corpus() {
    let (_room, whole) = corpus(None);
    let sampled = train(&whole, 300, &[], whole.bytes / 4).unwrap();
    let tokenizer = tercet_model::Tokenizer::from_bytes(sampled.as_bytes()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 300);
}
