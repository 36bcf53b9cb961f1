package aegis

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the sender's side of commands: SendCommand; the Job, which follows a command, waits for its outcome, or cancels
// it; and Commands, which lists them.

// A Priority is how urgent a command is, which decides which of the waiting commands starts first. Critical is the most urgent,
// followed by High, Normal and Low.
type Priority int

const (
	Normal Priority = iota
	Low
	High
	Critical
)

// prioritySuffixes has what a priority adds to a command's subject.
var prioritySuffixes = map[Priority]string{Critical: ".critical", High: ".high", Low: ".low"}

// SendCommand sends a command, which one instance of the service executes, and returns a [Job] that follows it. SendCommand
// returns when the server has stored the command. The command waits in the queue until an instance takes it, even if no instance
// runs now.
//
// With [IdempotencyKey], a command that any process sends again with the same key is executed only once, and the Job follows
// the first one. The outcome is kept for one day. During that time the key can't be used for a new command, even if the command
// failed or was cancelled: use another key, or [Service.Redrive]. Without a key, each SendCommand sends a new command. The
// other options are [AtPriority], [At], [After], [ExpireAfter], [Retry] and [Sticky]. An attempt that is repeated because its
// confirmation is missing does not make a second command. SendCommand blocks until ctx ends at most, or for several times
// [WithTimeout] if ctx has no deadline.
//
// Errors:
//   - [ErrInvalid] if a name, an option or a header is invalid, if data can't be encoded or is larger with its headers than the
//     server's max_payload less 2 KiB, or if the key was used with other data
//   - [ErrUnimplemented] if instances of the service run, but none of them handles the command
//   - those of [Publish]
func SendCommand[T, R any](ctx context.Context, s *Service, service, command string, data T, opts ...CallOption) (*Job[R], error) {
	cfg, failure := newCallConfig(kindCommand, opts)
	if failure = cmp.Or(checkNames(service, kindCommand, command), failure); failure != nil {
		return nil, failure
	}
	id := cmp.Or(deref(cfg.key), rand.Text())
	if failure := s.sendCommand(ctx, service, command, id, &data, cfg); failure != nil {
		return nil, failure
	}
	return Attach[R](s, service, command, id), nil
}

func (s *Service) sendCommand(ctx context.Context, service, command, id string, value any, cfg *callConfig) *Error {
	what, subject := "the command "+service+"."+command, commandPrefix+service+"."+command
	out, failure := s.marshal(value, what)
	if failure != nil {
		return failure
	}
	digest := digestValue(value)
	return s.through(ctx, kindSend, subject, out, func(ctx context.Context, data []byte) *Error {
		header := s.newHeader(ctx)
		header[headerID], header[headerDigest] = []string{id}, []string{digest}
		if failure := s.seal(header, Raw{data, out.codec}, what); failure != nil {
			return failure
		}
		digest := digest                                  // middleware may send several times
		if !bytes.Equal(data, out.data) || digest == "" { // middleware has changed it, or JSON can't express the value
			digest = digestPayload(header, data)
		}
		header[headerDigest] = []string{digest} // for Redrive, because that of the payload may differ
		return s.createCommand(ctx, service, command, id, header, data, cfg)
	})
}

// createCommand creates the record of a command, unless it exists, and queues the command.
func (s *Service) createCommand(
	ctx context.Context, service, command, id string, header nats.Header, data []byte, cfg *callConfig,
) *Error {
	key, subject := recordKey(service, command, id), commandPrefix+service+"."+command
	if len(copyHeader(header)) < len(header) { // copyHeader has left out a header that can't be sent
		return notRun(newError(ErrInvalid, "the command %s.%s has a header that can't be sent: %q",
			service, command, slices.Collect(maps.Keys(header))))
	}
	if s.unhandled(ctx, service, subject) {
		return notRun(newError(ErrUnimplemented, "instances of %s run, but none handles the command %s", service, command))
	}
	due := cfg.due()
	if !due.IsZero() {
		if failure := s.checkCommandSchedule(ctx, scheduleOf(key), due); failure != nil {
			return failure
		}
	}
	rec := &record{State: stateQueued, Due: due, Priority: *cfg.priority, Source: s.name, Digest: header.Get(headerDigest)}
	if !due.IsZero() {
		rec.State = stateScheduled
	}
	if cfg.expire > 0 {
		rec.Expire = slices.MaxFunc([]time.Time{due, time.Now()}, time.Time.Compare).Add(cfg.expire).UTC()
	}
	stored, revision, failure := s.writeRecord(ctx, key, rec, 0, cfg)
	if failure != nil && failure.Code == errConflict.Code && stored == nil && revision > 0 { // the record was deleted
		stored, revision, failure = s.writeRecord(ctx, key, rec, revision, cfg)
	}
	switch {
	case failure != nil && (failure.Code != errConflict.Code || stored == nil):
		return failure
	case stored.Digest != rec.Digest && stored.Digest != "" && rec.Digest != "":
		return notRun(newError(ErrInvalid, "IdempotencyKey(%q): %s.%s was sent with that key and other data", id, service, command))
	case stored.final():
		return nil
	}
	// The record is new, or its sender may have stopped before it queued the command, or somebody may have emptied the queue. A
	// message too many does no harm.
	x := &exchange{subject: commandPrefix + service + "." + command + prioritySuffixes[stored.Priority], header: header, data: data}
	if stored.State == stateScheduled && time.Until(stored.Due) > 0 {
		x.header = maps.Clone(header)
		setSchedule(x.header, stored.Due, x.subject, "")
		x.subject = scheduleOf(key)
	}
	failure = s.queueCommand(ctx, x, cfg)
	if failure != nil && failure.NotRun && cfg.key == nil { // nobody can send it again: cancel the record, so that it expires
		rec.State = stateCanceled
		_, _, _ = s.writeRecord(ctx, key, rec, revision, callConfigs[kindCommand])
	}
	return failure
}

// queueCommand stores x, the message that makes a worker look at the record. Its message id is its own, so that a command that is
// queued again is not taken for a duplicate.
func (s *Service) queueCommand(ctx context.Context, x *exchange, cfg *callConfig) *Error {
	x.header = withHeader(x.header, jetstream.MsgIDHeader, rand.Text())
	return s.storeWithRetries(ctx, x, s.commandStream(), cfg)
}

// digestValue returns the same text for equal values: a hash of their canonical JSON. It is "" for a value that JSON can't
// express.
func digestValue(value any) string {
	out, err := marshal(JSON, value) // a Raw keeps its format
	if err != nil {
		return ""
	}
	return digestPayload(nats.Header{headerContentType: {out.codec.ContentType()}}, out.data)
}

// digestPayload is digestValue for an encoded value.
func digestPayload(h nats.Header, data []byte) string {
	var v any
	var err error
	if c := codecFor(h, data, JSON); c == JSON {
		d := json.NewDecoder(bytes.NewReader(data))
		d.UseNumber() // otherwise large numbers would become equal
		err = d.Decode(&v)
	} else {
		err = c.Unmarshal(data, &v)
	}
	sorted, unsorted := json.Marshal(v)
	if err != nil || unsorted != nil {
		return ""
	}
	sum := sha256.Sum256(sorted)
	return hex.EncodeToString(sum[:16])
}

// A Job follows a command that was sent. [SendCommand] returns one, and [Attach] makes one in any process.
type Job[R any] struct {
	ID string // the id of the command

	svc              *Service
	service, command string
}

// Attach returns the Job of a command that was sent before, perhaps by another process. Attach does not check its parameters. The
// methods of the Job do, and fail with [ErrInvalid] if the name of the service or of the command is invalid, and with
// [ErrNotFound] if the command does not exist.
func Attach[R any](s *Service, service, command, id string) *Job[R] {
	return &Job[R]{ID: id, svc: s, service: service, command: command}
}

// Updates yields the present state of the command, then each change, and ends after the final state. Between changes it blocks.
// If changes come in quick succession, some of them may be left out, but never the last one. While the server can't be reached,
// Updates waits for it.
//
// If an error occurs, Updates yields it and ends.
//
// Errors:
//   - [ErrTimeout] or [ErrCanceled] if ctx ends
//   - [ErrNotFound] if the command does not exist, or if its outcome is no longer kept
//   - [ErrInvalid] if the name of the service or of the command is invalid
//   - [ErrInternal] if the record of the command can't be read
//   - [ErrDenied] if the server's permissions do not allow it
//   - [ErrClosed] after Stop
func (j *Job[R]) Updates(ctx context.Context) iter.Seq2[Progress, error] {
	return func(yield func(Progress, error) bool) {
		show := func(rec *record) bool { return yield(rec.progress(), nil) }
		if failure := j.svc.follow(ctx, j.service, j.command, j.ID, show); failure != nil {
			yield(Progress{}, failure)
		}
	}
}

// Wait waits until the command has its outcome, or until ctx ends, and returns the result. While the server can't be reached,
// Wait waits for it.
//
// Errors:
//   - that of the handler if the command failed
//   - [ErrTimeout] if the command expired ([ExpireAfter])
//   - [ErrCanceled] if the command was cancelled
//   - [ErrInternal] if the result can't be decoded into R, or if all attempts at the command crashed
//   - those of [Job.Updates]
func (j *Job[R]) Wait(ctx context.Context) (result R, err error) {
	var last *record
	failure := j.svc.follow(ctx, j.service, j.command, j.ID, func(rec *record) bool {
		last = rec
		return true
	})
	switch {
	case failure != nil:
		return result, failure
	case last.State == stateCanceled:
		return result, newError(ErrCanceled, "the command %s of %s.%s was cancelled", j.ID, j.service, j.command)
	case last.State == stateFailed:
		return result, cmp.Or(last.Error, newError(ErrInternal, "the command %s of %s.%s failed", j.ID, j.service, j.command))
	}
	c := codecFor(nats.Header{headerContentType: {last.Type}}, last.Result, j.svc.cfg.codec)
	if err := decodePayload(c, last.Result, &result); err != nil {
		return result, newError(ErrInternal, "the result of %s.%s is not %v", j.service, j.command, err)
	}
	return result, nil
}

// Cancel cancels the command, and returns when the server has stored that. A command that is waiting never runs. If the command
// is running, the ctx of its handler ends, and the result of the handler is ignored. If the command was cancelled before,
// Cancel has no effect and returns nil. Cancel blocks until ctx ends at most, or for several times [WithTimeout] if ctx has no
// deadline.
//
// Errors:
//   - [ErrInvalid] if the command has completed or failed, or if the name of the service or of the command is invalid
//   - [ErrNotFound] if the command does not exist, or if its outcome is no longer kept
//   - those of [Publish]
func (j *Job[R]) Cancel(ctx context.Context) error {
	s, service, command, id := j.svc, j.service, j.command, j.ID
	if failure := checkNames(service, kindCommand, command); failure != nil {
		return failure
	}
	key := recordKey(service, command, id)
	rec, revision, failure := s.readRecord(ctx, nil, key)
	for failure == nil || failure.Code == errConflict.Code {
		switch {
		case rec == nil:
			return notRun(newError(ErrNotFound, "there is no command %s of %s.%s", id, service, command))
		case rec.State == stateCanceled:
			return nil
		case rec.expired():
			next := *rec
			next.expire(service)
			rec, revision, failure = s.writeRecord(ctx, key, &next, revision, callConfigs[kindCommand])
			continue
		case rec.final():
			return notRun(newError(ErrInvalid, "too late to cancel the command %s of %s.%s: it is %s", id, service, command, rec.State))
		case ctx.Err() != nil:
			return asError(ctx.Err())
		}
		next := *rec
		next.State = stateCanceled
		if rec, revision, failure = s.writeRecord(ctx, key, &next, revision, callConfigs[kindCommand]); failure == nil {
			s.notify(cancelSubject(service), []byte(commandPrefix+key)) // if this is lost, the worker notices at its next check or write
			return nil
		}
	}
	return failure
}

// follow passes the present record to each, and then the records that replace it, until one is final or each returns false.
func (s *Service) follow(ctx context.Context, service, command, id string, each func(*record) bool) *Error {
	if failure := checkNames(service, kindCommand, command); failure != nil {
		return failure
	}
	latest := uint64(0)
	for n := 1; ; n++ {
		failure := s.followOnce(ctx, recordKey(service, command, id), &latest, each)
		switch {
		case failure == nil || failure != errDropped && !retryable(failure):
			return failure
		case s.base.Err() != nil:
			return notRun(s.closedError())
		case !sleep(ctx, backoff(n, 10*time.Millisecond, time.Second)):
			return asError(ctx.Err())
		}
	}
}

// followOnce is follow on one connection: it fails when that is lost. latest is the revision of the record that each got last.
func (s *Service) followOnce(ctx context.Context, key string, latest *uint64, each func(*record) bool) *Error {
	c := s.pick()
	if c == nil {
		return errDropped
	}
	sl, failure := c.newSlot(updatePrefix+key, 128)
	if failure != nil {
		return failure
	}
	defer c.endSlot(sl)
	m := &nats.Msg{} // the latest update; if it is empty, the record is read
	// The record is read again soon, because the first updates may be lost: in a cluster, the server that republishes them may not
	// know of the subscription yet.
	interval := time.Second
	for {
		revision, err := strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
		rec, failure := parseRecord(key, m.Data)
		if err != nil || failure != nil || rec == nil {
			rec, revision, failure = s.readRecord(ctx, c, key) // on c, whose server has the slot's subscription by then
		}
		switch {
		case failure != nil:
			return failure
		case rec == nil:
			return notRun(newError(ErrNotFound, "there is no command %s", key))
		case revision > *latest:
			if *latest = revision; !each(rec) || rec.final() {
				return nil
			}
		}
		wait := interval
		switch {
		case rec.expired(): // without a worker, nobody else may write that
			next := *rec
			next.expire(strings.SplitN(key, ".", 2)[0])
			_, _, failure := s.writeRecord(ctx, key, &next, revision, callConfigs[kindCommand])
			if failure == nil || failure.Code == errConflict.Code {
				m = &nats.Msg{}
				continue
			}
		case !rec.Expire.IsZero() && rec.State != stateRunning: // one that runs has no time limit here
			wait = min(wait, max(time.Until(rec.Expire), 0)+time.Millisecond)
		}
		sl.wakeAt(clock() + wait)
		select {
		case <-ctx.Done():
			return asError(ctx.Err())
		case m = <-sl.answers:
		}
		if m == nil {
			if failure := s.whyNoAnswer(c, sl, sl.sub.Subject); failure != nil && failure.Code != ErrTimeout.Code {
				return failure
			}
			m, interval = &nats.Msg{}, followInterval
		}
	}
}

// A CommandInfo describes a command in the list of [Service.Commands].
type CommandInfo struct {
	Service, Command string   // the service that handles it, and its name
	ID, Source       string   // its id, and the service that sent it
	Priority         Priority // how urgent it is
	Progress         Progress // its present state
	Error            *Error   // of a command that failed, or of the last attempt; nil if there is none
}

// Commands yields all commands of a service in the order of their last change: those that are scheduled, queued, running or
// retrying, and those whose outcome is kept. It is meant for operators, because it reads the commands one by one. A command that
// changes meanwhile may appear in its former state. Each read blocks until ctx ends at most, or for [WithTimeout] if ctx has no
// deadline. If a read fails, Commands yields the error and ends.
//
// Errors:
//   - [ErrInvalid] if the name of the service is invalid
//   - those of [Service.DeadLetters]
func (s *Service) Commands(ctx context.Context, service string) iter.Seq2[CommandInfo, error] {
	return func(yield func(CommandInfo, error) bool) {
		if failure := checkNames(service, kindCommand, "x"); failure != nil {
			yield(CommandInfo{}, failure)
			return
		}
		shown := map[string]bool{}
		item := func(m *jetstream.RawStreamMsg) (info CommandInfo, ok bool) {
			key := strings.TrimPrefix(m.Subject, recordPrefix)
			rec, failure := parseRecord(key, m.Data)
			if shown[key] || failure == nil && rec == nil { // rec is nil for a deleted record
				return info, false
			}
			shown[key] = true
			if failure != nil {
				rec = &record{Error: failure}
			}
			tokens := strings.SplitN(key, ".", 3)
			return CommandInfo{
				Service: service, Command: tokens[1], ID: idOf(tokens[2]), Source: rec.Source,
				Priority: rec.Priority, Progress: rec.progress(), Error: rec.Error,
			}, true
		}
		for range 2 { // the second time for those that were changed, and so moved behind the end, meanwhile
			for info, err := range stored(ctx, s, "KV_"+recordBucket, recordPrefix+service+".*.*", item) {
				if !yield(info, err) || err != nil {
					return
				}
			}
		}
	}
}
