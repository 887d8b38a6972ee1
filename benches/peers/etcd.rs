//! etcd: serializable reads, writes, and watches of one key. The few of its messages that it takes, by their numbers in
//! etcd's `rpc.proto` and `kv.proto`.

use prost::{Message, Oneof};

use crate::{
    grpc::{Method, Stream},
    protocol::{Broken, Told},
    users::{Users, Writes},
};

/// What all watches are on.
const WATCHED: &[u8] = b"watched";

/// From this replica, without asking the others.
pub(crate) struct Range(pub(crate) Users);

pub(crate) enum Put {
    Roles(Writes),
    /// Each write is a change that is watched.
    Watched(Writes),
}

pub(crate) struct Watch;

#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bool, tag = "7")]
    serializable: bool,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(int64, tag = "4")]
    count: i64,
}

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchRequest {
    #[prost(oneof = "Ask", tags = "1")]
    ask: Option<Ask>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Ask {
    #[prost(message, tag = "1")]
    Create(WatchCreateRequest),
}

#[derive(Clone, PartialEq, Message)]
struct WatchCreateRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct WatchResponse {
    #[prost(bool, tag = "3")]
    created: bool,
    #[prost(bool, tag = "4")]
    canceled: bool,
    #[prost(message, repeated, tag = "11")]
    events: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(message, optional, tag = "2")]
    kv: Option<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

impl Method for Range {
    fn path(&self) -> &'static str {
        "/etcdserverpb.KV/Range"
    }

    fn request(&mut self, message: &mut Vec<u8>) {
        put(&RangeRequest { key: key(self.0.next()), serializable: true }, message);
    }

    fn is_right(&self, answer: &[u8]) -> bool {
        RangeResponse::decode(answer).is_ok_and(|answer| answer.count == 1)
    }
}

impl Method for Put {
    fn path(&self) -> &'static str {
        "/etcdserverpb.KV/Put"
    }

    fn request(&mut self, message: &mut Vec<u8>) {
        let request = match self {
            Self::Roles(writes) => {
                let (_, user, role) = writes.next();
                PutRequest { key: key(user), value: role.into() }
            }
            Self::Watched(writes) => PutRequest { key: WATCHED.into(), value: writes.next().0.to_string().into() },
        };
        put(&request, message);
    }

    /// A header, with the revision of the write.
    fn is_right(&self, answer: &[u8]) -> bool {
        !answer.is_empty()
    }
}

impl Stream for Watch {
    fn path(&self) -> &'static str {
        "/etcdserverpb.Watch/Watch"
    }

    fn request(&self) -> Vec<u8> {
        WatchRequest { ask: Some(Ask::Create(WatchCreateRequest { key: WATCHED.into() })) }.encode_to_vec()
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn read(&self, message: &[u8], told: &mut Vec<Told>) -> Result<(), Broken> {
        let message = WatchResponse::decode(message).map_err(|error| Broken(error.to_string()))?;
        if message.canceled {
            return Err(Broken("etcd ended a watch".to_owned()));
        }
        told.extend(message.created.then_some(Told::Subscribed));
        for event in message.events {
            let value = event.kv.unwrap_or_default().value;
            let number = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
            told.extend(number.map(Told::Change));
        }
        Ok(())
    }
}

fn key(user: i64) -> Vec<u8> {
    format!("role:{user}").into()
}

fn put(request: &impl Message, message: &mut Vec<u8>) {
    request.encode(message).expect("a vector grows");
}
