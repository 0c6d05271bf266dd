//! Text to batches: what is read, what is refused, and that nothing crosses a document.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use tercet_model::Batch;
use tercet_train::Vocabulary;
use tercet_train::config::DataConfig;
use tercet_train::data::{
    Corpus, Shards, SplitRule, Stream, Tokenised, split, tokenise, unigram_entropy,
};
use tercet_train::tokenizer_train::train;

use crate::common::write_corpus;

fn data(paths: &[&Path]) -> DataConfig {
    let paths = paths.iter().map(|path| path.display().to_string()).collect();
    DataConfig { paths, ..DataConfig::default() }
}

fn scan(data: &DataConfig) -> Result<Corpus, String> {
    Corpus::scan(data, &AtomicBool::new(false)).map_err(|error| {
        assert!(error.is_users(), "{error}");
        error.to_string()
    })
}

fn documents(corpus: &Corpus) -> Vec<String> {
    let mut reader = corpus.documents();
    std::iter::from_fn(|| reader.next().unwrap()).collect()
}

fn gzip(path: &Path, text: &[u8]) {
    let file = fs::File::options().create(true).append(true).open(path).unwrap();
    let mut gz = flate2::write::GzEncoder::new(file, flate2::Compression::default());
    gz.write_all(text).unwrap();
    gz.finish().unwrap();
}

fn zstd(path: &Path, text: &[u8]) {
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let frame = ruzstd::encoding::compress_to_vec(text, level);
    fs::File::options().create(true).append(true).open(path).unwrap().write_all(&frame).unwrap();
}

#[test]
fn folders_globs_and_packed_files_become_documents_in_order() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    fs::create_dir_all(at("b/.git")).unwrap();
    fs::write(at("b/one.txt"), "one").unwrap();
    fs::write(at("b/code.rs"), "fn two() {}").unwrap();
    fs::write(at("b/.git/config.txt"), "hidden").unwrap();
    fs::write(at("b/picture.png"), "not looked at").unwrap();
    fs::write(at("b/lines.jsonl"), "{\"text\": \"three\", \"n\": 1}\n\n{\"text\": \"four\"}")
        .unwrap();
    // Two members and two frames: both formats allow it, and tools make them.
    gzip(&at("b/packed.txt.gz"), b"fi");
    gzip(&at("b/packed.txt.gz"), b"ve");
    zstd(&at("b/packed.jsonl.zst"), b"{\"text\": \"six\"}\n{\"te");
    zstd(&at("b/packed.jsonl.zst"), b"xt\": \"seven\"}\n");
    let corpus = scan(&data(&[&at("b")])).unwrap();
    let expected = ["fn two() {}", "three", "four", "one", "six", "seven", "five"];
    assert_eq!(documents(&corpus), expected);
    assert_eq!((corpus.files(), corpus.documents), (5, 7));
    assert_eq!(corpus.skipped.other_extension, 1);

    // A glob, and a file that is named as well as matched.
    let glob = at("b/*.txt");
    let corpus = scan(&data(&[&glob, &at("b/one.txt"), &at("b")])).unwrap();
    assert_eq!(corpus.documents, 7);
    // The same corpus elsewhere is the same corpus.
    let before = scan(&data(&[&at("b")])).unwrap().digest;
    fs::rename(at("b"), at("c")).unwrap();
    assert_eq!(scan(&data(&[&at("c")])).unwrap().digest, before);
    fs::write(at("c/one.txt"), "One").unwrap();
    assert_ne!(scan(&data(&[&at("c")])).unwrap().digest, before);
}

#[test]
fn files_that_are_not_text_are_counted_when_found_and_refused_when_named() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    fs::write(at("good.txt"), "good").unwrap();
    fs::write(at("empty.txt"), "").unwrap();
    fs::write(at("binary.txt"), b"abc\0def").unwrap();
    fs::write(at("latin.txt"), b"caf\xe9 au lait").unwrap();
    let corpus = scan(&data(&[room.path()])).unwrap();
    assert_eq!(documents(&corpus), ["good"]);
    let text = corpus.skipped.to_string();
    assert_eq!(text, "1 empty, 1 binary, 1 not UTF-8 (such as binary.txt, latin.txt)");
    for (name, words) in [
        ("empty.txt", "empty.txt is empty"),
        ("binary.txt", "binary.txt is not text"),
        ("latin.txt", "latin.txt is not UTF-8 (first at byte 3)"),
        ("missing.txt", "missing.txt: No such file"),
    ] {
        let error = scan(&data(&[&at(name)])).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let error = scan(&data(&[&at("*.rs")])).unwrap_err();
    assert!(error.contains("`data.paths` holds") && error.contains("matches no file"), "{error}");
    fs::remove_file(at("good.txt")).unwrap();
    let error = scan(&data(&[room.path()])).unwrap_err();
    assert!(error.contains("holds no text; files passed over: 1 empty, 1 binary"), "{error}");
    assert!(scan(&data(&[])).unwrap_err().contains("`data.paths` is empty"));
}

#[test]
fn damaged_archives_and_lines_name_file_and_line() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    let text: String = (0..4000).map(|i| format!("line {i} {}\n", i * 7919 % 1009)).collect();
    gzip(&at("cut.txt.gz"), text.as_bytes());
    zstd(&at("cut.txt.zst"), text.as_bytes());
    for name in ["cut.txt.gz", "cut.txt.zst"] {
        let bytes = fs::read(at(name)).unwrap();
        fs::write(at(name), &bytes[..bytes.len() * 2 / 3]).unwrap();
        let error = scan(&data(&[&at(name)])).unwrap_err();
        assert!(error.contains(name) && error.contains("damaged or cut short"), "{error}");
        fs::write(at(name), "not an archive").unwrap();
        let error = scan(&data(&[&at(name)])).unwrap_err();
        assert!(error.contains(name), "{error}");
    }
    for (content, words) in [
        ("{\"text\": \"a\"}\n{\"text\": ", "line 2 is not a JSON object"),
        ("{\"body\": \"a\", \"id\": 1}\n", "line 1 has no field `text` (it has: body, id)"),
        ("\n{\"text\": 5}\n", "line 2 has a number in `text`"),
        ("[1]\n", "line 1 has no field `text`"),
    ] {
        fs::write(at("x.jsonl"), content).unwrap();
        let error = scan(&data(&[&at("x.jsonl")])).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let body = DataConfig { text_field: "body".into(), ..data(&[&at("x.jsonl")]) };
    fs::write(at("x.jsonl"), "{\"body\": \"a\"}\n").unwrap();
    assert_eq!(documents(&scan(&body).unwrap()), ["a"]);
}

#[test]
fn long_files_are_cut_into_sections_that_join_to_the_whole() {
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("long.txt");
    // Lines, then a stretch without any, of characters of one to four bytes.
    let mut text: String = (0..9000).map(|i| format!("línea {i} 世界\n")).collect();
    text += &"é🦀x".repeat(30_000);
    fs::write(&path, format!("\u{feff}{text}")).unwrap();
    let found = documents(&scan(&data(&[&path])).unwrap());
    assert!(found.len() > 4 && found.iter().all(|section| section.len() <= 64 << 10));
    assert!(found[0].ends_with('\n'));
    assert_eq!(found.concat(), text);
    // The same through a line of JSON.
    let lines = room.path().join("long.jsonl");
    fs::write(&lines, format!("{}\n", serde_json::json!({ "text": text }))).unwrap();
    assert_eq!(documents(&scan(&data(&[&lines])).unwrap()).concat(), text);
}

#[test]
fn max_bytes_takes_the_same_files_wherever_they_are() {
    let room = tempfile::tempdir().unwrap();
    for place in ["a", "b"] {
        write_corpus(&room.path().join(place));
    }
    let part = |place: &str| {
        let data = data(&[&room.path().join(place)]);
        let all = scan(&data).unwrap();
        let part = scan(&DataConfig { max_bytes: Some(all.bytes / 3), ..data }).unwrap();
        assert!(part.bytes <= all.bytes / 3 && part.bytes > all.bytes / 5);
        documents(&part)
    };
    assert_eq!(part("a"), part("b"));
}

/// A tokenized corpus in a folder.
struct Room {
    folder: tempfile::TempDir,
    corpus: Corpus,
    vocabulary: Vocabulary,
}

impl Room {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_corpus(&folder.path().join("corpus"));
        let corpus = scan(&data(&[&folder.path().join("corpus")])).unwrap();
        let json = train(&corpus, 300, &[], 1 << 20).unwrap();
        Self { folder, corpus, vocabulary: Vocabulary::new(json, (None, None)).unwrap() }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    fn tokenise(&self) -> Tokenised {
        let stop = AtomicBool::new(false);
        tokenise(&self.corpus, &self.vocabulary, &self.cache(), &stop, &mut |_| {}, &mut || {})
            .unwrap()
    }
}

fn ids_of(shards: &Shards, document: usize) -> Vec<i32> {
    let mut ids = Vec::new();
    shards.read(document, 0, shards.tokens_of(document), &mut ids);
    ids
}

#[test]
fn shards_hold_every_document_between_its_marks_and_are_made_once() {
    let room = Room::new();
    let first = room.tokenise();
    assert!(!first.cached && first.rebuilt.is_none());
    let texts = documents(&room.corpus);
    assert_eq!(first.shards.len(), texts.len());
    for (document, text) in texts.iter().enumerate() {
        let ids = ids_of(&first.shards, document);
        assert_eq!((ids[0], ids[ids.len() - 1]), (0, 0));
        let inner: Vec<u32> = ids[1..ids.len() - 1].iter().map(|&id| id as u32).collect();
        assert_eq!(&room.vocabulary.tokenizer().decode(&inner).unwrap(), text);
    }
    let second = room.tokenise();
    assert!(second.cached);
    assert_eq!(second.key, first.key);
}

#[test]
fn a_special_token_that_a_document_spells_out_is_text() {
    let room = Room::new();
    let ids = room.vocabulary.encode_document("a<|endoftext|>b").unwrap();
    assert!(ids[1..ids.len() - 1].iter().all(|&id| id != room.vocabulary.eos()));
    let decoded = room.vocabulary.tokenizer().decode(&ids[1..ids.len() - 1]).unwrap();
    assert_eq!(decoded, "a<|endoftext|>b");
}

#[test]
fn damaged_shards_are_made_again_and_not_trusted() {
    let room = Room::new();
    let key = room.tokenise().key;
    let folder = room.cache().join(key);
    let names: Vec<PathBuf> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(names.len(), 3);
    let clean: Vec<Vec<u8>> = names.iter().map(|path| fs::read(path).unwrap()).collect();
    for (path, bytes) in names.iter().zip(&clean) {
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        for damage in [&bytes[..bytes.len() - 1], &flipped, b""] {
            fs::write(path, damage).unwrap();
            let again = room.tokenise();
            assert!(!again.cached && again.rebuilt.is_some(), "{}", path.display());
            let restored: Vec<Vec<u8>> = names.iter().map(|path| fs::read(path).unwrap()).collect();
            assert!(restored == clean, "{}", path.display());
        }
        fs::remove_file(path).unwrap();
        assert!(!room.tokenise().cached);
    }
    // What a killed writer left goes away.
    fs::create_dir(room.cache().join(".writing-1-x")).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    room.tokenise();
    assert!(!room.cache().join(".writing-1-x").exists());
}

#[test]
fn text_that_changes_between_readings_stops_the_run() {
    let room = Room::new();
    fs::write(room.folder.path().join("corpus/part-07.rs"), "something else").unwrap();
    let stop = AtomicBool::new(false);
    let cache = room.cache();
    let result = tokenise(&room.corpus, &room.vocabulary, &cache, &stop, &mut |_| {}, &mut || {});
    let text = result.err().unwrap().to_string();
    assert!(text.contains("part-07.rs changed while it was being read"), "{text}");
}

fn rule(share: f64) -> SplitRule {
    SplitRule { share, context: 50, seed: 3, batch: 128, batches: 4 }
}

#[test]
fn the_split_depends_on_the_text_of_a_document_alone() {
    let room = Room::new();
    let shards = room.tokenise().shards;
    let counts = |share| {
        let split = split(&shards, &rule(share)).unwrap();
        (split.train_documents, split.validation_documents)
    };
    assert_eq!(counts(0.0), (40, 0));
    // Too small a share still holds the lowest hash out.
    assert_eq!(counts(1e-9), (39, 1));
    let (train, held_out) = counts(0.3);
    assert_eq!(train + held_out, 40);
    assert!((4..=22).contains(&held_out), "{held_out} of 40");
    let twice = (split(&shards, &rule(0.3)).unwrap(), split(&shards, &rule(0.3)).unwrap());
    assert_eq!(twice.0.validation, twice.1.validation);
    assert_eq!(twice.0.validation.len(), 4);
    assert!(twice.0.validation.iter().all(|batch| batch.targets.len() == 128));
}

#[test]
fn unigram_entropy_is_that_of_the_targets() {
    let batch = |targets: &[i32]| Batch {
        input_ids: vec![0; targets.len()],
        targets: targets.to_vec(),
        cu_seqlens: vec![0, targets.len() as i32],
    };
    let entropy = unigram_entropy(&[batch(&[5, 5, 5]), batch(&[9])]);
    // −¾ ln ¾ − ¼ ln ¼.
    assert!((entropy - 0.562_335_144_618_808_3).abs() < 1e-15, "{entropy}");
    assert_eq!(unigram_entropy(&[batch(&[1, 1])]), 0.0);
}

/// Checks that a batch is documents' own tokens, and returns its (input, target) pairs.
fn check_batch(batch: &Batch, shards: &Shards, context: usize) {
    assert_eq!(batch.input_ids.len(), batch.targets.len());
    assert_eq!(batch.cu_seqlens[0], 0);
    assert_eq!(*batch.cu_seqlens.last().unwrap() as usize, batch.input_ids.len());
    let texts: Vec<Vec<i32>> = (0..shards.len()).map(|d| ids_of(shards, d)).collect();
    for bounds in batch.cu_seqlens.windows(2) {
        let (from, to) = (bounds[0] as usize, bounds[1] as usize);
        assert!(from < to && to - from <= context);
        let (inputs, targets) = (&batch.input_ids[from..to], &batch.targets[from..to]);
        // One document holds the inputs and, one further, the targets.
        let holds = |text: &Vec<i32>| {
            (0..text.len() - inputs.len()).any(|at| {
                &text[at..at + inputs.len()] == inputs
                    && &text[at + 1..at + 1 + inputs.len()] == targets
            })
        };
        assert!(texts.iter().any(holds), "a sequence is not part of one document");
    }
}

#[test]
fn an_epoch_is_every_position_once_and_packing_never_crosses_documents() {
    let room = Room::new();
    let shards = room.tokenise().shards;
    let all: Vec<usize> = (0..shards.len()).collect();
    let mut expected: Vec<(i32, i32)> = Vec::new();
    for document in 0..shards.len() {
        let ids = ids_of(&shards, document);
        expected.extend(ids.iter().copied().zip(ids[1..].iter().copied()));
    }
    expected.sort_unstable();
    for (context, len) in [(50, 128), (7, 100), (100_000, 333)] {
        let mut stream = Stream::new(&shards, &all, context, Some(11)).unwrap();
        assert_eq!(stream.positions(), expected.len() as u64);
        let mut pairs = Vec::new();
        let mut at = 0;
        while at < stream.positions() {
            let take = len.min((stream.positions() - at) as usize);
            let batch = stream.batch(&shards, at, take);
            assert_eq!(batch.input_ids.len(), take);
            if at < 2000 {
                check_batch(&batch, &shards, context);
            }
            pairs.extend(batch.input_ids.iter().copied().zip(batch.targets.iter().copied()));
            at += take as u64;
        }
        pairs.sort_unstable();
        assert!(pairs == expected, "context {context}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn batches_are_a_pure_function_of_seed_and_position(
        seed in any::<u64>(),
        mut starts in prop::collection::vec(0u64..40_000, 1..6),
        len in 1usize..400,
        context in 2usize..200,
    ) {
        thread_local! {
            static SHARDS: (Room, Shards) = {
                let room = Room::new();
                let shards = room.tokenise().shards;
                (room, shards)
            };
        }
        SHARDS.with(|(_, shards)| {
            let documents: Vec<usize> = (0..shards.len()).collect();
            let new = || Stream::new(shards, &documents, context, Some(seed)).unwrap();
            // Asked in any order, across epochs, by one stream or by fresh ones.
            let mut one = new();
            let forward: Vec<Batch> = starts.iter().map(|&at| one.batch(shards, at, len)).collect();
            for (at, batch) in starts.iter().zip(&forward) {
                assert_eq!(&new().batch(shards, *at, len), batch);
            }
            starts.reverse();
            for (at, batch) in starts.iter().zip(forward.iter().rev()) {
                assert_eq!(&one.batch(shards, *at, len), batch);
            }
            // Neighbouring batches join to the longer one, wherever they are cut.
            let (at, cut) = (starts[0], len / 2);
            let (a, b) = (one.batch(shards, at, cut), one.batch(shards, at + cut as u64, len - cut));
            let whole = one.batch(shards, at, len);
            assert_eq!([a.input_ids, b.input_ids].concat(), whole.input_ids);
            assert_eq!([a.targets, b.targets].concat(), whole.targets);
        });
    }
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let room = Room::new();
    let shards = room.tokenise().shards;
    let all: Vec<usize> = (0..shards.len()).collect();
    let batch = |seed, epoch: u64| {
        let mut stream = Stream::new(&shards, &all, 50, Some(seed)).unwrap();
        let start = stream.positions() * epoch;
        stream.batch(&shards, start, 500)
    };
    assert_eq!(batch(1, 0), batch(1, 0));
    assert_ne!(batch(1, 0), batch(1, 1));
    assert_ne!(batch(1, 0), batch(2, 0));
}
