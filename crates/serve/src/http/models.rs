//! `/v1/models`: the names that requests may use.

use hyper::StatusCode;
use serde_json::{Value, json};

use super::body::{Response, json_response};
use super::error::{ApiError, ApiResult};
use super::text::Served;

/// All of them.
pub fn all(served: &Served) -> Response {
    let names = served.names();
    let data: Vec<Value> = names.iter().map(|name| describe(served, name)).collect();
    json_response(StatusCode::OK, &json!({ "object": "list", "data": data }))
}

/// One by its name.
pub fn one(served: &Served, name: &str) -> ApiResult<Response> {
    let names = served.names();
    if !names.iter().any(|n| n == name) {
        return Err(ApiError::no_model(name, &names));
    }
    Ok(json_response(StatusCode::OK, &describe(served, name)))
}

fn describe(served: &Served, name: &str) -> Value {
    let parent = (name != served.name).then_some(&served.name);
    json!({
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "tercet",
        "root": served.name,
        "parent": parent,
        "max_model_len": served.engine.context(),
        "sparse": served.sparse,
    })
}
