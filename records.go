package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the records of commands: what they say, and how they are read and written.

// A record is everything that is known about a command except its data. It is stored as JSON, so that an operator can read it:
// nats kv get aegis_commands <service>.<command>.<id>.
type record struct {
	State     string    `json:"state"`
	Percent   float64   `json:"percent,omitempty"`
	Message   string    `json:"message,omitempty"`
	Attempt   int       `json:"attempt,omitempty"`
	Time      time.Time `json:"time"`
	Priority  Priority  `json:"priority,omitempty"`
	Source    string    `json:"source,omitempty"`
	Due       time.Time `json:"due,omitzero"`       // when it may begin
	Expire    time.Time `json:"expire,omitzero"`    // when it may not begin any more
	Digest    string    `json:"digest"`             // of the data; "" if that can't be compared
	Failures  int       `json:"failures,omitempty"` // attempts that failed
	Crashes   int       `json:"crashes,omitempty"`  // attempts that ended without a result
	Owner     string    `json:"owner,omitempty"`    // the instance that has claimed it last
	Run       string    `json:"run,omitempty"`      // identifies the run that has claimed it last
	ClaimedBy uint64    `json:"wake,omitempty"`     // the stream sequence of the message with which it was claimed last
	ClaimedAt int       `json:"delivery,omitempty"` // which delivery of that message it was, counted from 1
	Nonce     string    `json:"nonce"`              // makes each change unique, so that compareAndSwap recognizes its own
	Result    []byte    `json:"result,omitempty"`
	Type      string    `json:"type,omitempty"` // the content type of Result
	Error     *Error    `json:"error,omitempty"`
}

func (r *record) final() bool {
	return r.State == stateCompleted || r.State == stateFailed || r.State == stateCanceled
}

// expired reports whether the command may not begin any more, and does not run.
func (r *record) expired() bool {
	return !r.final() && r.State != stateRunning && !r.Expire.IsZero() && time.Until(r.Expire) <= 0
}

// expire makes r the record of a command that has expired.
func (r *record) expire(service string) {
	last := r.Error
	r.Error = newError(ErrTimeout, "it had to begin by %s", r.Expire.Format(time.RFC3339))
	r.Error.Source, r.Error.Cause, r.State = service, last, stateFailed
}

func (r *record) progress() Progress {
	return Progress{State: r.State, Percent: r.Percent, Message: r.Message, Attempt: r.Attempt, Time: r.Time}
}

// recordKey returns the key of a record, <service>.<command>.<id>. An id that is not a token is encoded.
func recordKey(service, command, id string) string {
	if !isToken(id, maxIDLength) {
		id = "=" + base64.RawURLEncoding.EncodeToString([]byte(id))
	}
	return service + "." + command + "." + id
}

// idOf returns the id in the last token of a record's key.
func idOf(token string) string {
	if encoded, ok := strings.CutPrefix(token, "="); ok {
		if id, err := base64.RawURLEncoding.DecodeString(encoded); err == nil {
			return string(id)
		}
	}
	return token
}

// writeRecord replaces the record by rec if it still has the given revision; 0 means that there is no record yet. It returns the
// record that is stored then, and its revision: rec, or if somebody else has changed the record the present one, nil if it was
// deleted. In this case the failure is a conflict.
func (s *Service) writeRecord(ctx context.Context, key string, rec *record, revision uint64, cfg *callConfig) (
	now *record, nowRevision uint64, failure *Error,
) {
	rec.Nonce, rec.Time = rand.Text(), time.Now().UTC()
	data, err := json.Marshal(rec)
	if err != nil {
		return nil, 0, asError(err)
	}
	x := &exchange{subject: recordPrefix + key, data: data}
	if rec.final() {
		x.header = nats.Header{jetstream.MsgTTLHeader: {resultTTL.String()}}
	}
	var value []byte
	_, failure = s.withRetries(ctx, x, cfg, func() (_ *nats.Msg, failure *Error, again bool) {
		value, nowRevision, failure = s.compareAndSwap(ctx, x, s.recordStream(), revision)
		return nil, failure, retryable(failure)
	})
	if failure == nil {
		return rec, nowRevision, nil
	}
	now, unreadable := parseRecord(key, value)
	return now, nowRevision, cmp.Or(unreadable, failure)
}

// readRecord asks the bucket's leader for the latest record, which is nil if there is none. It uses the connection c if that is
// not nil.
func (s *Service) readRecord(ctx context.Context, c *conn, key string) (*record, uint64, *Error) {
	data, revision, failure := s.readKey(ctx, c, recordBucket, key)
	rec, unreadable := parseRecord(key, data)
	return rec, revision, cmp.Or(failure, unreadable)
}

// parseRecord returns the record in data, or nil if data is empty.
func parseRecord(key string, data []byte) (*record, *Error) {
	if len(data) == 0 {
		return nil, nil
	}
	rec := &record{}
	if err := json.Unmarshal(data, rec); err != nil {
		return nil, newError(ErrInternal, "the record of %s can't be read: %v", key, err)
	}
	return rec, nil
}
