package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the worker's side of commands. A command is work that is queued and handled by one instance at a time. It reports
// its progress, can be cancelled, and has one outcome, which is kept.
//
// The record of a command, in the bucket aegis_commands, is authoritative, and every change of it is a compare-and-swap. The
// message in the work queue AEGIS_COMMANDS carries the data and makes a worker look at the record. The server republishes each
// change of a record to those who follow the command.

// A Command is a command as a handler of [HandleCommand] gets it.
type Command[T any] struct {
	ID       string   // the key of IdempotencyKey, or random if there is none
	Source   string   // the service that sent it, as the sender claims; not authenticated
	Priority Priority // the priority that AtPriority has set
	Attempt  int      // the number of this attempt, from 1; crashes count, but not RetryAfter or attempts that Stop has ended
	Fence    uint64   // a fencing token, which rises with each attempt: a store that remembers the highest can reject older attempts
	Last     Progress // the progress before this attempt, with the last report of the previous attempt
	Data     T        // the decoded payload

	run *commandRun
}

// A Progress is the state of a command at one moment.
type Progress struct {
	State   string    // scheduled, queued, running or retrying; at the end completed, failed or canceled
	Percent float64   // 0 to 100
	Message string    // the message of the last report
	Attempt int       // the number of the latest attempt; 0 before the first
	Time    time.Time // when the state was written, by the clock of the process that wrote it
}

// The states of a command.
const stateScheduled, stateQueued, stateRunning, stateRetrying = "scheduled", "queued", "running", "retrying"
const stateCompleted, stateFailed, stateCanceled = "completed", "failed", "canceled"

const (
	commandStream = "AEGIS_COMMANDS"
	commandPrefix = "commands."
	recordBucket  = "aegis_commands"
	recordPrefix  = "$KV." + recordBucket + "."
	updatePrefix  = "aegis.jobs." // where changes of records are republished

	resultTTL        = 24 * time.Hour
	recordTimeout    = 5 * time.Second        // for reading or writing the record of a command that runs
	outcomeTimeout   = 3 * time.Second        // for an attempt to write the outcome of a run
	progressInterval = 100 * time.Millisecond // between writes of progress
	maxProgress      = 1 << 10                // bytes of a progress message
	clockSkew        = time.Second            // by which a worker may begin a command early, by its own clock
	followInterval   = 10 * time.Second       // between reads of a record, in case an update was lost
)

func (s *Service) commandStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: commandStream, Subjects: []string{commandPrefix + "*.*", commandPrefix + "*.*.*", commandSchedulePrefix + "*.*.*"},
		Retention: jetstream.WorkQueuePolicy, Replicas: s.cfg.replicas}
}

// recordStream returns the configuration of the bucket's stream.
func (s *Service) recordStream() jetstream.StreamConfig {
	config := s.bucket(recordBucket)
	config.AllowMsgTTL = true
	config.RePublish = &jetstream.RePublish{Source: recordPrefix + ">", Destination: updatePrefix + ">"}
	return config
}

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
	ClaimedAt int       `json:"delivery,omitempty"` // the number of the delivery of that message by which it was claimed last
	ClaimedBy uint64    `json:"wake,omitempty"`     // the stream sequence of the message that led to the claim
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

// writeRecord replaces the record by rec if it still has the given revision; 0 means that there is no record yet. If somebody
// else has changed the record, the failure is a conflict, and writeRecord returns the present record, nil if it was deleted, and
// its revision.
func (s *Service) writeRecord(ctx context.Context, key string, rec *record, revision uint64, cfg *callConfig) (
	now *record, at uint64, failure *Error,
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
		value, at, failure = s.compareAndSwap(ctx, x, s.recordStream(), revision)
		return nil, failure, retryable(failure)
	})
	if failure == nil {
		return rec, at, nil
	}
	now, unreadable := parseRecord(key, value)
	return now, at, cmp.Or(unreadable, failure)
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

// HandleCommand makes fn the handler of a command of the service. command is a letter, then letters, digits and _, at most 128
// characters. fn is called on a goroutine of the library, up to [Concurrency] at once in each instance. fn's ctx ends after
// [Deadline], when the command is cancelled, when another instance has taken over the command, and when Stop's time is up.
//
// A command has one outcome. Once the outcome is stored, fn is not called again, unless a command that has failed is redriven
// ([Service.Redrive]). Before that, fn may be called more than once. If fn returns an error, it is called again after a pause
// ([Backoff]), up to [Attempts] times in all. A crash counts as an attempt, and another instance begins the next attempt after 10
// s, the ack wait of the consumer. In an instance that was paused or cut off, fn may still run for a moment after another instance
// has taken over the command. Therefore make effects on other systems idempotent by Command.ID, or guard them with Command.Fence.
//
// If the last attempt fails, the command has failed, and becomes a dead letter. A command whose data can't be decoded into T, or
// for which fn returns [Permanent], fails at once. If fn returns [RetryAfter], it is called again later, which does not count as
// an attempt. If fn returns [context.Canceled] although the command was not cancelled, the attempt has failed as with any other
// error. The encoded result must not be larger than 3/4·(max_payload - 2 KiB), with the max_payload of the server; a command with
// a larger result fails at once.
//
// The outcome is stored as soon as the server can be reached, however long that takes. If the process ends before that, or if
// Stop's time is up, the attempt counts as a crash.
//
// If a handler returns an error because its ctx ended when Stop's time was up, the command is queued again, and the attempt does
// not count. If a handler ignores its ctx for longer than 0.2 s, the attempt counts, and the command is delivered again only after
// the ack wait.
//
// HandleCommand does not block before [Service.Start]. After Start, it also makes the consumers, and blocks for [WithTimeout] at
// most.
//
// Errors:
//   - [ErrInvalid] if command or an option is invalid, if fn is nil, or if the command has a handler already
//   - those of [Subscribe], for the streams AEGIS_COMMANDS and AEGIS_DEAD and the bucket aegis_commands instead of AEGIS_EVENTS
func HandleCommand[T, R any](
	s *Service, command string, fn func(context.Context, *Command[T]) (R, error), opts ...HandlerOption,
) error {
	if fn == nil {
		return s.noteRegistration(newError(ErrInvalid, "command %q: the function is nil", command))
	}
	handler := typed("the result of "+command, func(ctx context.Context, r *request, m *Message, data T) (any, error) {
		run := r.run
		cmd := &Command[T]{ID: r.id, Source: m.Source, Fence: run.fence.Load(), Last: run.last, Data: data, run: run}
		cmd.Priority, cmd.Attempt = run.rec.Priority, run.rec.Attempt // nobody changes these while the handler runs
		result, err := fn(ctx, cmd)
		return &result, err
	})
	return s.noteRegistration(s.handleCommand(command, handler, opts))
}

func (s *Service) handleCommand(command string, fn HandlerFunc, opts []HandlerOption) error {
	cfg, failure := s.newHandlerConfig(kindCommand, opts)
	if failure := cmp.Or(checkNames(s.name, kindCommand, command), failure); failure != nil {
		return failure
	}
	e := &endpoint{kind: kindCommand, name: command, subject: commandPrefix + s.name + "." + command, handler: fn}
	var lanes []*lane
	for _, level := range []Priority{Critical, High, Normal, Low} { // the most urgent first
		suffix := prioritySuffixes[level]
		lanes = append(lanes, newLane(s.name+"~"+command+strings.Replace(suffix, ".", "~", 1), e.subject+suffix))
	}
	src := &commandSource{feed: newFeed(e, cfg, s.commandStream(), lanes...)}
	src.inspect = src.checkRuns
	e.source = src
	return s.addEndpoint(e, cfg)
}

// A commandSource is the source of an endpoint's commands.
type commandSource struct {
	*feed

	checking atomic.Bool // whether a goroutine of checkRuns is at work
	runs     sync.Map    // string -> *commandRun, by the key of the record
}

// A commandRun is one attempt at a command.
type commandRun struct {
	src      *commandSource
	key      string // of the record
	nonce    string // identifies this run in the record
	r        *request
	last     Progress                 // of the previous attempt
	fence    atomic.Uint64            // the revision of the claim, 0 until the command is claimed
	reported atomic.Pointer[Progress] // the latest report; nil if it was written, and then writeProgress does not run

	reporting  context.Context // ends when the handler has returned, or with an *Error as its cause when the command is lost
	endReports context.CancelCauseFunc

	writing  sync.Mutex // guards the next two; held while the record is written, so that there is one change at a time
	rec      record
	revision uint64
}

func (src *commandSource) open(ctx context.Context) error {
	if _, failure := src.svc.openStream(ctx, src.svc.recordStream(), recordPrefix+">"); failure != nil {
		return failure
	}
	src.svc.probePublish(recordPrefix+recordKey(src.svc.name, src.name, "probe"), readSubject(recordBucket))
	return src.feed.open(ctx)
}

// serve handles one message, which makes this instance look at the record of its command.
func (src *commandSource) serve(m *nats.Msg, arrived time.Time) {
	defer src.release()
	r := src.newRequest(m, arrived)
	if r == nil {
		src.acknowledge(m, ackTerminate)
		return
	}
	run := &commandRun{src: src, key: recordKey(src.svc.name, src.name, r.id), nonce: rand.Text(), r: r}
	run.reporting, run.endReports = context.WithCancelCause(context.Background())
	r.run = run
	if src.svc.timeUp.Load() || !src.admit(r) {
		src.giveBack(m)
		return
	}
	if _, busy := src.runs.LoadOrStore(run.key, run); busy { // it was redelivered because the server did not hear that it runs
		return
	}
	defer src.runs.Delete(run.key)
	notice := commandPrefix + run.key
	src.svc.cancels.add(notice, func() { src.goHelper(func() { run.check() }) })
	defer src.svc.cancels.remove(notice)
	if run.claim() {
		src.dispatch(run.r)
	}
}

// claim claims the command for this run: it writes a record that names this run. If claim reports false, it has
// acknowledged the message, or stored the outcome, and the handler must not be called.
func (run *commandRun) claim() bool {
	src, sequence := run.src, run.r.delivery.sequence
	run.writing.Lock()
	defer run.writing.Unlock()
	ctx, cancel := context.WithTimeout(src.svc.base, recordTimeout)
	defer cancel()
	rec, revision, failure := src.svc.readRecord(ctx, nil, run.key)
	for failure == nil || failure.Code == errConflict.Code {
		if rec != nil && rec.Run == run.nonce && rec.State == stateRunning { // it was claimed just now, but the confirmation was lost
			run.revision = revision
			run.fence.Store(revision)
			return true
		}
		if rec == nil && run.r.delivery.firing {
			rec = run.recordOfFiring()
		}
		if rec == nil || rec.final() {
			src.acknowledge(run.r.in, ack)
			return false
		}
		if early := time.Until(rec.Due); rec.State == stateScheduled && early > clockSkew {
			src.acknowledge(run.r.in, nakAfter(early))
			return false
		}
		delivery := run.r.delivery.attempt
		switch {
		case rec.ClaimedBy == sequence && delivery <= rec.ClaimedAt:
			return false // this delivery was held up, and a later one has claimed the command since
		case rec.ClaimedBy != 0 && rec.ClaimedBy != sequence && rec.State != stateQueued && src.leaveToOther(ctx, rec, run.r):
			return false
		}
		run.rec, run.revision = *rec, revision
		if rec.State == stateRunning { // the instance that has claimed it has crashed, or lost the connection
			run.rec.Crashes++
		}
		if !rec.Expire.IsZero() && time.Until(rec.Expire) <= 0 {
			run.rec.expire(src.svc.name)
			src.meter.count(run.r.msg.Source, run.rec.Error)
			run.writeAndAcknowledge(ack)
			return false
		}
		if run.rec.Failures+run.rec.Crashes >= src.cfg.attempts {
			last := run.rec.Error
			if last == nil {
				last = newError(ErrInternal, "its handler began %d times and never finished: "+
					"it crashed or hung, or its instance lost the connection", run.rec.Crashes)
				last.Source = src.svc.name
				src.meter.count(run.r.msg.Source, last)
			}
			run.fail(last)
			return false
		}
		run.last = rec.progress()
		run.rec.State, run.rec.Owner, run.rec.Run, run.rec.ClaimedBy, run.rec.ClaimedAt = stateRunning, src.svc.id, run.nonce, sequence, delivery
		run.rec.Attempt++
		rec, revision, failure = src.svc.writeRecord(ctx, run.key, &run.rec, revision, callConfigs[kindCommand])
		if failure == nil {
			run.revision = revision
			run.fence.Store(revision)
			return true
		}
	}
	src.logger(run.r).Warn("a command can't be claimed", "error", failure)
	src.acknowledge(run.r.in, nakAfter(backoff(run.r.delivery.attempt, retryPause, 5*time.Second)))
	return false
}

// recordOfFiring returns the first record of a command that a schedule has sent.
func (run *commandRun) recordOfFiring() *record {
	rec := &record{State: stateQueued, Source: run.r.msg.Source}
	for level, suffix := range prioritySuffixes {
		if strings.HasSuffix(run.r.msg.Subject, suffix) {
			rec.Priority = level
		}
	}
	if ttl := run.r.in.Header.Get(jetstream.MsgTTLHeader); ttl != "" {
		rec.Expire = run.r.delivery.stored.Add(lifetime(ttl)).UTC()
	}
	return rec
}

// leaveToOther reports whether another message than that of r led to the claim of a command and will lead to its next attempt, so that r's
// need not. It has acknowledged r's message then. Somebody may have removed the other message from the queue. Then r's takes its
// place: at once if the command waits, and if it runs as soon as its deadline is over.
func (src *commandSource) leaveToOther(ctx context.Context, rec *record, r *request) bool {
	c := src.svc.pick()
	if c == nil {
		return false // then the claim fails, too
	}
	stream, err := c.js.Stream(ctx, commandStream)
	if err == nil {
		_, err = stream.GetMsg(ctx, rec.ClaimedBy)
	}
	ackWait := time.Duration(src.ackWait.Load())
	switch {
	case !errors.Is(err, jetstream.ErrMsgNotFound): // it is there, or this instance may not look
		src.acknowledge(r.in, ack)
	case rec.State == stateRunning && time.Duration(r.delivery.attempt)*ackWait < src.cfg.deadline+ackWait:
		src.acknowledge(r.in, nakAfter(ackWait))
	default:
		return false
	}
	return true
}

// write writes the record with the latest report, and retries until ctx ends or the time is up. If the command is lost, it ends
// the handler's ctx and returns the error that says why.
func (run *commandRun) write(ctx context.Context, within time.Duration) *Error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if p := run.reported.Load(); p != nil {
		run.rec.Percent, run.rec.Message = p.Percent, p.Message
	}
	cfg := *callConfigs[kindCommand]
	cfg.sticky = true
	for {
		now, revision, failure := run.src.svc.writeRecord(ctx, run.key, &run.rec, run.revision, &cfg)
		switch {
		case failure == nil:
			run.revision = revision
			return nil
		case failure.Code != errConflict.Code:
			return failure
		case now == nil || now.Run != run.nonce || now.State == stateCanceled:
			return run.revoke(now)
		}
		run.revision = revision // an earlier write was stored, but its confirmation was lost
	}
}

// revoke ends the handler's ctx because the command was cancelled or belongs to another instance, as its record says now. It
// returns the error that says so.
func (run *commandRun) revoke(now *record) *Error {
	failure := newError(ErrFenced, "another instance has taken over the command %s", run.r.id)
	if now != nil && now.State == stateCanceled {
		failure = newError(ErrCanceled, "the command %s was cancelled", run.r.id)
	}
	run.endReports(failure)
	run.r.abort()
	return failure
}

// revocation returns the error that says why the command was lost while the handler ran, or nil if it was not.
func (run *commandRun) revocation() *Error {
	failure, _ := context.Cause(run.reporting).(*Error)
	return failure
}

// checkRuns checks all runs, in case the notice of a cancellation was lost. It does not block.
func (src *commandSource) checkRuns() {
	if src.checking.CompareAndSwap(false, true) {
		src.goHelper(func() {
			defer src.checking.Store(false)
			src.runs.Range(func(_, run any) bool { return run.(*commandRun).check() })
		})
	}
}

// check reads the record and ends the handler's ctx if the command is lost. It reports false if the record can't be read.
func (run *commandRun) check() bool {
	ctx, cancel := context.WithTimeout(run.src.svc.base, recordTimeout)
	defer cancel()
	claimed := run.fence.Load() > 0 // loaded before the read, because a record that was read before the claim has another run
	now, _, failure := run.src.svc.readRecord(ctx, nil, run.key)
	if failure == nil && now != nil && (now.State == stateCanceled || claimed && now.Run != run.nonce) {
		run.revoke(now)
	}
	return failure == nil
}

// Progress reports the progress of the command. [Job.Updates] yields the report, and the next attempt gets it in Command.Last.
// percent is 0 to 100, and message is cut off after 1,024 bytes. Progress does not block. If several reports come within 0.1 s,
// only the last of them is stored.
//
// Errors:
//   - [ErrCanceled] if the command was cancelled, so that the handler should return
//   - [ErrFenced] if another instance has taken over the command, so that the handler should return
//   - [ErrInvalid] if percent is out of range, if the handler has returned, or if the command is not from HandleCommand
func (c *Command[T]) Progress(percent float64, message string) error {
	run := c.run
	switch {
	case !(percent >= 0 && percent <= 100):
		return newError(ErrInvalid, "Progress(%v): want 0 to 100", percent)
	case run == nil:
		return newError(ErrInvalid, "Progress: the command is not from HandleCommand")
	case run.reporting.Err() != nil:
		return cmp.Or(run.revocation(), newError(ErrInvalid, "Progress: the handler has returned"))
	}
	if run.reported.Swap(&Progress{Percent: percent, Message: cutText(message, maxProgress)}) == nil {
		run.src.goHelper(run.writeProgress)
	}
	return nil
}

// writeProgress writes the latest report, at intervals, until no other report has come in an interval or the handler has
// returned. In the latter case the report is written with the outcome.
func (run *commandRun) writeProgress() {
	for more := true; more; {
		p, failure := run.reported.Load(), (*Error)(nil)
		run.writing.Lock()
		if run.reporting.Err() == nil { // otherwise the record may belong to the next run already
			failure = run.write(run.src.svc.base, recordTimeout)
		}
		run.writing.Unlock()
		if failure != nil {
			run.src.logger(run.r).Warn("progress was not written", "error", failure)
		}
		more = sleep(run.reporting, progressInterval) && (failure != nil || !run.reported.CompareAndSwap(p, nil))
	}
}

// done writes the outcome, or queues the command again, and acknowledges the message.
func (src *commandSource) done(r *request, data []byte, failure *Error) {
	run := r.run
	run.writing.Lock() // waits for a write of progress, which may find that the command is lost
	defer run.writing.Unlock()
	run.endReports(nil)
	lost := run.revocation()
	if lost == nil && failure != nil && failure.Code == ErrCanceled.Code && src.svc.base.Err() == nil {
		own := newError(ErrInternal, "the handler returned an error as if the command had been cancelled, which it was not: %s", failure.Message)
		own.Source, failure = failure.Source, own
	}
	switch {
	case lost != nil:
		run.giveUp(lost)
	case failure == nil:
		codec := cmp.Or(r.codec, src.svc.cfg.codec) // r has none if middleware answered
		if p := run.reported.Swap(nil); p != nil {
			run.rec.Message = p.Message
		}
		run.rec.Percent = 100
		run.rec.State, run.rec.Result, run.rec.Type, run.rec.Error = stateCompleted, data, codec.ContentType(), nil
		run.writeAndAcknowledge(ack)
	case src.svc.base.Err() != nil || r.fenced: // Stop has cancelled the handler, or another instance leads
		run.requeue()
	default:
		failure = failure.cut()
		run.rec.Error = failure
		if r.retryAfter != nil {
			run.rec.State = stateRetrying
			run.rec.Attempt--
			src.logOften(r, slog.LevelInfo, "a command is handled again later", "error", failure, "pause", r.retryAfter.pause)
			run.writeAndAcknowledge(nakAfter(r.retryAfter.pause))
			return
		}
		if run.rec.Failures++; r.permanent || run.rec.Failures+run.rec.Crashes >= src.cfg.attempts {
			run.fail(failure)
			return
		}
		run.rec.State = stateRetrying
		pause := backoff(run.rec.Failures, src.cfg.backoff, src.cfg.maxBackoff)
		src.logOften(r, slog.LevelWarn, "an attempt failed", "error", failure, "attempt", run.rec.Attempt, "pause", pause)
		run.writeAndAcknowledge(nakAfter(pause))
	}
}

// fail stores the command as a dead letter, and then its outcome. After a crash in between, the next run does both again.
func (run *commandRun) fail(failure *Error) {
	if !run.src.storeDeadLetter(run.r, failure, run.rec.Failures+run.rec.Crashes) {
		run.requeue()
		return
	}
	run.rec.State, run.rec.Error = stateFailed, failure
	run.writeAndAcknowledge(ack)
}

// writeAndAcknowledge writes the record and then acknowledges the message in the way that how says. It goes on trying, and keeps the message,
// until the record is written, the command is lost, or Stop's time is up.
func (run *commandRun) writeAndAcknowledge(how string) {
	for n := 1; ; n++ {
		failure := run.write(context.Background(), outcomeTimeout)
		switch {
		case failure == nil:
			run.src.acknowledge(run.r.in, how)
		case run.revocation() == nil && run.src.svc.base.Err() == nil:
			run.src.logOften(run.r, slog.LevelWarn, "the outcome of a command is not stored yet", "error", failure)
			run.src.acknowledge(run.r.in, ackInProgress)
			sleep(run.src.svc.base, backoff(n, retryPause, outcomeTimeout))
			continue
		default:
			run.giveUp(failure)
		}
		return
	}
}

// requeue queues the command again. If it was claimed, the attempt does not count.
func (run *commandRun) requeue() {
	run.src.svc.requeueing.Add(1)
	defer run.src.svc.requeueing.Add(-1)
	run.rec.State = stateQueued
	if run.fence.Load() > 0 {
		run.rec.Attempt--
	}
	if failure := run.write(context.Background(), returnTimeout); failure != nil {
		run.giveUp(failure)
		return
	}
	run.src.giveBack(run.r.in)
}

// giveUp gives up the command because of failure: another instance has taken it over, it was cancelled, or its record could not
// be written. It acknowledges the message only if the command was cancelled. Otherwise the server redelivers the message after
// the ack wait, unless the instance that has the command acknowledges it.
func (run *commandRun) giveUp(failure *Error) {
	if failure.Code == ErrCanceled.Code {
		run.src.acknowledge(run.r.in, ack)
		return
	}
	run.src.logger(run.r).Warn("the outcome of a command was not stored", "error", failure)
}

// redriveCommand queues the command of a dead letter again.
func (s *Service) redriveCommand(ctx context.Context, d DeadLetter) *Error {
	tokens := strings.Split(d.Subject, ".")
	id := d.Header.Get(headerID)
	if len(tokens) < 3 || id == "" {
		return notRun(newError(ErrInvalid, "Redrive: %s with the id %q is not a command", d.Subject, id))
	}
	key := recordKey(tokens[1], tokens[2], id)
	rec, revision, failure := s.readRecord(ctx, nil, key)
	if failure != nil {
		return failure
	}
	rec = cmp.Or(rec, &record{State: stateFailed}) // the record has expired
	next := record{State: stateQueued, Priority: rec.Priority, Attempt: rec.Attempt}
	next.Digest, next.Source = d.Header.Get(headerDigest), d.Header.Get(headerSource)
	switch {
	case rec.State == stateFailed:
		_, _, failure = s.writeRecord(ctx, key, &next, revision, callConfigs[kindCommand])
	case rec.State != stateQueued || rec.Digest != next.Digest: // otherwise an earlier Redrive may have come no further than this
		return notRun(newError(ErrInvalid, "Redrive: the command %s is %s, and only one that failed is queued again", id, rec.State))
	}
	switch {
	case failure != nil && failure.Code == errConflict.Code:
		return notRun(newError(ErrUnavailable, "Redrive: somebody else has just changed the command %s: try again", id))
	case failure != nil:
		return failure
	}
	x := &exchange{subject: d.Subject, header: copyHeader(d.Header), data: d.Data}
	return s.queueCommand(ctx, x, callConfigs[kindCommand])
}
