//! Help texts, error messages and exit codes, as a user sees them: `tests/cmd/*.trycmd`.
//!
//! `TRYCMD=overwrite cargo test --release -p tercet-cli --test commands` writes them anew; read
//! the difference before committing it.

#[test]
fn help_errors_and_exit_codes_are_what_the_snapshots_say() {
    trycmd::TestCases::new()
        .default_bin_name("tercet")
        .env("COLUMNS", "100")
        .case("tests/cmd/*.trycmd");
}
