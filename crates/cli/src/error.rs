//! Exit codes: 0 fine, 2 what the user gave us, 1 ours, 3 a claim that was put to the test and fell.
//!
//! One rule: the outermost error of the chain that has an owner decides. The library crates say
//! whose their errors are (`is_users()`); errors about arguments, files and disks that the user can
//! put right are the user's. Everything else, panics included, is ours.

use std::io;

/// An argument or file that this binary itself refuses. The text says what was wrong, what was
/// expected and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UserError(pub String);

/// A [`UserError`] ready to be returned.
pub fn user(text: impl Into<String>) -> anyhow::Error {
    UserError(text.into()).into()
}

/// A claim that was put to the test and fell; nothing went wrong on the way.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refuted(pub String);

/// What happened, cause after cause. Library errors often quote their cause themselves; it is not
/// said twice.
pub fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The exit code of a failed verb.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Refuted>() {
        return 3;
    }
    let owner = error.chain().find_map(is_users);
    if owner == Some(true) { 2 } else { 1 }
}

/// Whose a cause is: the user's, ours, or not known.
fn is_users(cause: &(dyn std::error::Error + 'static)) -> Option<bool> {
    if let Some(error) = cause.downcast_ref::<tercet_train::Error>() {
        return Some(error.is_users());
    }
    if let Some(error) = cause.downcast_ref::<tercet_model::Error>() {
        return Some(error.is_users());
    }
    if let Some(error) = cause.downcast_ref::<tercet_tensor::Error>() {
        return Some(error.is_users());
    }
    if let Some(error) = cause.downcast_ref::<tercet_cuda::Error>() {
        return Some(error.is_users());
    }
    if let Some(error) = cause.downcast_ref::<tercet_private::Error>() {
        return Some(error.is_users());
    }
    if let Some(error) = cause.downcast_ref::<tercet_eval::Error>() {
        return Some(error.is_users());
    }
    if let Some(error) = cause.downcast_ref::<tercet_serve::engine::StartError>() {
        return Some(error.is_users());
    }
    if let Some(error) = cause.downcast_ref::<io::Error>() {
        return Some(is_users_io(error));
    }
    let users = cause.is::<UserError>()
        || cause.is::<tercet_attention::Error>()
        || cause.is::<tercet_attention::SpecError>()
        || cause.is::<serde_json::Error>();
    users.then_some(true)
}

/// A path that is missing, forbidden or of the wrong kind, a full or read-only disk: the user can
/// put it right. Anything else the system refuses us is not the user's.
fn is_users_io(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound
            | Kind::PermissionDenied
            | Kind::AlreadyExists
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::DirectoryNotEmpty
            | Kind::InvalidFilename
            | Kind::InvalidData
            | Kind::UnexpectedEof
            | Kind::ReadOnlyFilesystem
            | Kind::StorageFull
            | Kind::QuotaExceeded
            | Kind::FileTooLarge
    )
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("disk full").context("cannot write x: disk full");
        assert_eq!(message(&error.context("saving")), "saving: cannot write x: disk full");
    }

    #[test]
    fn the_users_errors_exit_2_through_any_context_ours_1_and_what_fell_3() {
        let missing = io::Error::from(io::ErrorKind::NotFound);
        let users: [anyhow::Error; 3] = [
            user("no such verb"),
            tercet_attention::Error::CuSeqlens("decreases".into()).into(),
            Err::<(), _>(missing).context("reading x").context("quickstart").unwrap_err(),
        ];
        for error in users {
            assert_eq!(exit_code(&error), 2, "{error:#}");
        }
        let ours = [anyhow::anyhow!("a bug"), io::Error::from(io::ErrorKind::OutOfMemory).into()];
        for error in ours {
            assert_eq!(exit_code(&error), 1, "{error:#}");
        }
        assert_eq!(exit_code(&Refuted("ε is more".into()).into()), 3);
    }
}
