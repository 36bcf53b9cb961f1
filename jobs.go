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
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file is the sender's side of commands: SendCommand, and the Job that follows one, waits for its outcome, or cancels it.

// A Priority says which of the commands that wait comes first.
type Priority int

const (
	Normal Priority = iota
	Low
	High
	Critical
)

// levels are the priorities, the most urgent first, and what their subjects end in.
var (
	levels   = []Priority{Critical, High, Normal, Low}
	suffixes = map[Priority]string{Critical: ".critical", High: ".high", Low: ".low"}
)

// SendCommand has a command executed by one instance of a service, and returns when that is certain: when the server has stored
// it. It is queued until an instance takes it, also while none runs.
//
// With [IdempotencyKey] the same command, sent again from anywhere, is executed once: the Job is one on the execution that
// there is, or on its outcome, which is kept for a day. Without, each send is a command of its own. [AtPriority], [Retry] and
// [Sticky] apply; what is sent again for want of a confirmation is the same command.
//
// Errors: [ErrInvalid] for a name or an option out of range, data that can't be encoded or is too large, or a key that was used
// with other data; [ErrUnimplemented] if instances of the service run, but none handles the command; otherwise those of
// [Publish].
func SendCommand[T, R any](ctx context.Context, s *Service, service, command string, data T, opts ...CallOption) (*Job[R], error) {
	cfg, failure := newCallConfig(kindCommand, opts)
	if failure := cmp.Or(checkNames(service, kindCommand, command), failure); failure != nil {
		return nil, failure
	}
	payload, buf, err := marshal(s.cfg.codec, &data)
	if err != nil {
		return nil, notRun(newError(ErrInvalid, "encoding the command %s.%s: %v", service, command, err))
	}
	id := cmp.Or(deref(cfg.key), rand.Text())
	if failure := s.sendCommand(ctx, service, command, id, payload, buf, cfg); failure != nil {
		return nil, failure
	}
	return Attach[R](s, service, command, id), nil
}

func (s *Service) sendCommand(ctx context.Context, service, command, id string, data []byte, buf *packer, cfg *callConfig) *Error {
	key, subject := recordKey(service, command, id), commandPrefix+service+"."+command
	priority := Normal
	if cfg.priority != nil {
		priority = *cfg.priority
	}
	header := s.envelope(ctx)
	header[headerID] = []string{id}
	if label := contentType(s.cfg.codec, data); label != "" {
		header[headerContentType] = []string{label}
	}
	if size, limit := messageSize(header, data), s.conns[0].limit.Load()-letterRoom; size > limit {
		return notRun(newError(ErrInvalid, "the command %s.%s has %d bytes with its headers, more than %d: the server's max_payload, less %d for what a dead letter adds",
			service, command, size, limit, letterRoom))
	}
	if len(copyHeader(header)) < len(header) {
		return notRun(newError(ErrInvalid, "the command %s.%s has a header that can't be sent: %q", service, command, slices.Collect(maps.Keys(header))))
	}
	if s.unhandled(ctx, service, subject) {
		return notRun(newError(ErrUnimplemented, "instances of %s run, but none handles the command %s", service, command))
	}
	rec := &record{State: queued, Priority: priority, Source: s.name, Digest: digest(header, data)}
	now, revision, failure := s.writeRecord(ctx, key, rec, 0, cfg)
	if failure != nil && failure.Code == conflict.Code && now == nil && revision > 0 { // deleted by someone else
		now, revision, failure = s.writeRecord(ctx, key, rec, revision, cfg)
	}
	if failure != nil && failure.Code == conflict.Code && now != nil {
		if now.Digest != rec.Digest {
			return notRun(newError(ErrInvalid, "IdempotencyKey(%q): %s.%s was sent with that key and other data", id, service, command))
		}
		if now.State != queued {
			return nil
		}
		failure = nil // whoever queued it may not have come further
	}
	if failure != nil {
		return failure
	}
	failure = s.wake(ctx, subject+suffixes[now.Priority], key, revision, header, data, buf, cfg)
	if failure != nil && failure.NotRun && cfg.key == nil { // nobody can send it again: let its record expire
		rec.State = canceled
		_, _, _ = s.writeRecord(ctx, key, rec, revision, callConfigs[kindCommand])
	}
	return failure
}

// wake publishes what makes a worker look at a record that is queued.
func (s *Service) wake(ctx context.Context, subject, key string, revision uint64, header nats.Header, data []byte, buf *packer, cfg *callConfig) *Error {
	header = withHeader(header, jetstream.MsgIDHeader, key+"@"+strconv.FormatUint(revision, 10))
	return s.storeWithRetries(ctx, &exchange{subject: subject, header: header, data: data}, s.commandStream(), cfg, buf)
}

// digest is the same for equal data, whatever order its encoder has put the keys of a map in.
func digest(h nats.Header, data []byte) string {
	var v any
	canonical := data
	if c, err := codecFor(h, data, JSON); err == nil && (c == JSON || c == MsgPack) {
		if c == JSON {
			d := json.NewDecoder(bytes.NewReader(data))
			d.UseNumber() // lest large numbers become equal
			err = d.Decode(&v)
		} else {
			err = c.Unmarshal(data, &v)
		}
		if sorted, unsorted := json.Marshal(v); err == nil && unsorted == nil {
			canonical = sorted
		}
	}
	sum := sha256.Sum256(canonical)
	return hex.EncodeToString(sum[:16])
}

// A Job is a command as its sender sees it. Its methods may be called from several goroutines, and from several processes.
type Job[R any] struct {
	ID string

	svc              *Service
	service, command string
}

// Attach is the Job of a command that was sent before, perhaps by another process. Whether there is one turns out with its methods:
// [ErrNotFound].
func Attach[R any](s *Service, service, command, id string) *Job[R] {
	return &Job[R]{ID: id, svc: s, service: service, command: command}
}

// Updates yields the command's present state, then each change as it happens, and ends with the final one. Of changes that
// follow each other fast some may be left out, but never the last. An error ends it: ctx's, or [ErrNotFound] if there is no
// such command, or no more.
func (j *Job[R]) Updates(ctx context.Context) iter.Seq2[Progress, error] {
	return func(yield func(Progress, error) bool) {
		j.svc.follow(ctx, j.service, j.command, j.ID, func(rec *record, failure *Error) bool {
			if failure != nil {
				return yield(Progress{}, failure)
			}
			return yield(rec.progress(), nil)
		})
	}
}

// Wait returns the command's result when it is completed. If it failed, the error is the handler's; if it was cancelled,
// [ErrCanceled]. It blocks until then or until ctx ends. Other errors: [ErrNotFound] if there is no such command, or no more.
func (j *Job[R]) Wait(ctx context.Context) (result R, err error) {
	var last *record
	j.svc.follow(ctx, j.service, j.command, j.ID, func(rec *record, failure *Error) bool {
		last = rec
		if failure != nil {
			err = failure
		}
		return true
	})
	switch {
	case err != nil:
		return result, err
	case last.State == canceled:
		return result, newError(ErrCanceled, "the command %s of %s.%s was cancelled", j.ID, j.service, j.command)
	case last.State == failed:
		return result, cmp.Or(last.Error, newError(ErrInternal, "the command %s of %s.%s failed", j.ID, j.service, j.command))
	}
	c, err := codecFor(nats.Header{headerContentType: {last.Type}}, last.Result, j.svc.cfg.codec)
	if err == nil {
		err = c.Unmarshal(last.Result, &result)
	}
	if err != nil {
		return result, newError(ErrInternal, "the result of %s.%s is not %T: %v", j.service, j.command, result, err)
	}
	return result, nil
}

// Cancel cancels the command: if it is queued, it never runs; if it runs, its handler's ctx ends, and what the handler returns
// counts no more. It returns when that is certain. A command that has ended already is left as it is: then the error is
// [ErrInvalid], unless it was cancelled. Others: [ErrNotFound], and those of [Publish].
func (j *Job[R]) Cancel(ctx context.Context) error {
	return j.svc.cancelCommand(ctx, j.service, j.command, j.ID).orNil()
}

func (s *Service) cancelCommand(ctx context.Context, service, command, id string) *Error {
	if failure := checkNames(service, kindCommand, command); failure != nil {
		return failure
	}
	key := recordKey(service, command, id)
	rec, revision, failure := s.readRecord(ctx, nil, key)
	for failure == nil || failure.Code == conflict.Code {
		switch {
		case rec == nil:
			return notRun(newError(ErrNotFound, "there is no command %s of %s.%s", id, service, command))
		case rec.State == canceled:
			return nil
		case rec.final():
			return notRun(newError(ErrInvalid, "the command %s of %s.%s is %s: it is too late to cancel it", id, service, command, rec.State))
		}
		next := *rec
		next.State = canceled
		if rec, revision, failure = s.writeRecord(ctx, key, &next, revision, callConfigs[kindCommand]); failure == nil {
			s.notify(cancelSubject(service), []byte(commandPrefix+key)) // if it is lost, its worker learns of it when it writes
			return nil
		}
		if err := ctx.Err(); err != nil {
			return asError(err)
		}
	}
	return failure
}

// follow hands the present record to each, then what it changes to, until it is final or each returns false. An error is the last.
func (s *Service) follow(ctx context.Context, service, command, id string, each func(*record, *Error) bool) {
	if failure := checkNames(service, kindCommand, command); failure != nil {
		each(nil, failure)
		return
	}
	key := recordKey(service, command, id)
	revision := uint64(0)
	show := func(rec *record, at uint64) (on bool) {
		if at <= revision {
			return true
		}
		revision = at
		return each(rec, nil) && !rec.final()
	}
	for n := 1; ; n++ {
		c := s.pick()
		if c != nil {
			sl, failure := c.newSlot(updatePrefix+key, 128)
			if failure == nil {
				failure = s.followOn(ctx, c, sl, key, show)
				c.endSlot(sl)
			}
			if failure == nil {
				return
			}
			if failure != errDropped && !retryable(failure) {
				each(nil, failure)
				return
			}
		}
		if s.base.Err() != nil {
			each(nil, s.disconnectedError())
			return
		}
		if !sleep(ctx, backoff(n, 10*time.Millisecond, time.Second)) {
			each(nil, asError(ctx.Err()))
			return
		}
	}
}

// followOn does so as long as the connection stands; no error means that it is over.
func (s *Service) followOn(ctx context.Context, c *conn, sl *slot, key string, show func(*record, uint64) bool) *Error {
	sl.drops, sl.since = c.drops.Load(), clock()
	for look := time.Second; ; look = followInterval {
		rec, at, failure := s.readRecord(ctx, c, key) // after the server has seen the subscription, which came by the same way
		switch {
		case failure != nil:
			return failure
		case rec == nil:
			return notRun(newError(ErrNotFound, "there is no command %s", key))
		case !show(rec, at):
			return nil
		}
		for again := false; !again; {
			sl.wakeAt(clock() + look)
			select {
			case m := <-sl.answers:
				if m == nil {
					if failure := s.answerLost(c, sl, sl.sub.Subject); failure != nil && failure.Code != ErrTimeout.Code {
						return failure
					}
					again = true // look, in case that a message was lost
					continue
				}
				at, err := strconv.ParseUint(m.Header.Get("Nats-Sequence"), 10, 64)
				rec := &record{}
				if err != nil || MsgPack.Unmarshal(m.Data, rec) != nil {
					again = true
				} else if !show(rec, at) {
					return nil
				}
			case <-ctx.Done():
				return asError(ctx.Err())
			}
		}
	}
}
