package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
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
//
// A worker calls serve for a message. claim writes a record that names this run, dispatch runs the handler, and done writes the
// outcome or the next state to the record and then acknowledges the message. Because every write is a compare-and-swap, a run
// that another instance has taken over fails at its next write.

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
	return jetstream.StreamConfig{
		Name:      commandStream,
		Subjects:  []string{commandPrefix + "*.*", commandPrefix + "*.*.*", commandSchedulePrefix + "*.*.*"},
		Retention: jetstream.WorkQueuePolicy, Replicas: s.cfg.replicas,
	}
}

// recordStream returns the configuration of the bucket's stream.
func (s *Service) recordStream() jetstream.StreamConfig {
	config := s.bucket(recordBucket)
	config.AllowMsgTTL = true
	config.RePublish = &jetstream.RePublish{Source: recordPrefix + ">", Destination: updatePrefix + ">"}
	return config
}

// HandleCommand makes fn the handler of a command of the service. command is a letter, then letters, digits and _, at most 128
// characters. fn is called on a goroutine of the library, up to [Concurrency] at once in each instance. fn's ctx ends after
// [Deadline], when the command is cancelled, when another instance has taken over the command, and when Stop's time is up.
//
// A command has one outcome. Once the outcome is stored, fn is not called again, unless a command that has failed is redriven
// ([Service.Redrive]). Before that, fn may be called more than once. If fn returns an error, it is called again after a pause
// ([Backoff]), up to [Attempts] times in all. A crash counts as an attempt, and another instance begins the next attempt after
// 10 s, the ack wait of the consumer. In an instance that was paused or cut off, fn may still run for a moment after another
// instance has taken over the command. Therefore make effects on other systems idempotent by Command.ID, or guard them with
// Command.Fence.
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
// If a handler returns an error because its ctx ended when Stop's time was up, the command is queued again, and the attempt
// does not count. If a handler ignores its ctx for longer than 0.2 s, the attempt counts, and the command is delivered again
// only after the ack wait.
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
	if failure = cmp.Or(checkNames(s.name, kindCommand, command), failure); failure != nil {
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

// A commandRun is one attempt at a command in this instance.
type commandRun struct {
	src      *commandSource
	key      string // the key of the record
	nonce    string // identifies this run in the record
	r        *request
	last     Progress                 // of the previous attempt
	fence    atomic.Uint64            // the revision of the claim, 0 until the command is claimed
	reported atomic.Pointer[Progress] // the latest report; nil if it was written, and then writeProgress does not run

	reporting  context.Context // ends when the handler has returned or, with an *Error as its cause, when revoke was called
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

// claim claims the command for this run: it writes a record that names this run. If claim reports false, the handler must not be
// called: the message was dealt with, or a later delivery of it has claimed the command.
func (run *commandRun) claim() bool {
	src := run.src
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
		if rec == nil && run.r.delivery.fromSchedule {
			rec = run.recordOfFiring()
		}
		if rec == nil || rec.final() {
			src.acknowledge(run.r.in, ack)
			return false
		}
		if run.mustWait(ctx, rec) {
			return false
		}
		run.rec, run.revision = *rec, revision
		if rec.State == stateRunning { // the instance that has claimed it has crashed, or lost the connection
			run.rec.Crashes++
		}
		if run.failIfSpent() {
			return false
		}
		run.last = rec.progress()
		run.rec.State, run.rec.Owner, run.rec.Run = stateRunning, src.svc.id, run.nonce
		run.rec.ClaimedBy, run.rec.ClaimedAt = run.r.delivery.sequence, run.r.delivery.attempt
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

// mustWait reports whether this run must not claim the command now, because it is not due, or because it belongs to another
// delivery. Then mustWait has acknowledged the message, unless it has to be left alone.
func (run *commandRun) mustWait(ctx context.Context, rec *record) bool {
	d := run.r.delivery
	if early := time.Until(rec.Due); rec.State == stateScheduled && early > clockSkew {
		run.src.acknowledge(run.r.in, nakAfter(early))
		return true
	}
	if rec.ClaimedBy == d.sequence {
		return d.attempt <= rec.ClaimedAt // a later delivery of the same message has claimed the command already
	}
	return rec.ClaimedBy != 0 && rec.State != stateQueued && run.src.leaveToOther(ctx, rec, run.r)
}

// failIfSpent writes the outcome of a command that has expired, or that has no more attempts. It reports whether it did.
func (run *commandRun) failIfSpent() bool {
	src, rec := run.src, &run.rec
	switch {
	case !rec.Expire.IsZero() && time.Until(rec.Expire) <= 0:
		rec.expire(src.svc.name)
		src.meter.count(run.r.msg.Source, rec.Error)
		run.writeAndAcknowledge(ack)
	case rec.Failures+rec.Crashes >= src.cfg.attempts:
		last := rec.Error
		if last == nil {
			last = newError(ErrInternal, "its handler began %d times and never finished: "+
				"it crashed or hung, or its instance lost the connection", rec.Crashes)
			last.Source = src.svc.name
			src.meter.count(run.r.msg.Source, last)
		}
		run.fail(last)
	default:
		return false
	}
	return true
}

// recordOfFiring returns the first record of a command that a schedule has sent.
func (run *commandRun) recordOfFiring() *record {
	rec := &record{State: stateQueued, Source: run.r.msg.Source}
	for level, suffix := range prioritySuffixes {
		if strings.HasSuffix(run.r.msg.Subject, suffix) {
			rec.Priority = level
		}
	}
	if lifetime := parseTTL(run.r.in.Header.Get(jetstream.MsgTTLHeader)); lifetime > 0 {
		rec.Expire = run.r.delivery.stored.Add(lifetime).UTC()
	}
	return rec
}

// A command may have several messages in the queue, because a sender that gets no confirmation, or that uses the key again,
// queues it again. One of them is enough: the one with which the command was claimed.
//
// leaveToOther reports whether r's message can be left alone, because the one with which the command was claimed is still in
// the queue and will lead to the next attempt. Then r's message is acknowledged. If the other message was removed from the
// queue, r's takes its place: at once if the command waits, and after the deadline of the handler if the command runs. Until
// then r's message is redelivered at intervals.
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

// write writes the record with the latest report, and retries until ctx ends or the time is up. If the record says that the
// command was cancelled or taken over, write returns the error of revoke.
func (run *commandRun) write(ctx context.Context, within time.Duration) *Error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if p := run.reported.Load(); p != nil {
		run.rec.Percent, run.rec.Message = p.Percent, p.Message
	}
	cfg := *callConfigs[kindCommand]
	cfg.sticky = true // makes writeRecord retry until ctx ends
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

// revoke ends the handler's ctx, because its record now says that the command was cancelled or that another instance has
// claimed it. It returns the error for that.
func (run *commandRun) revoke(now *record) *Error {
	failure := newError(ErrFenced, "another instance has taken over the command %s", run.r.id)
	if now != nil && now.State == stateCanceled {
		failure = newError(ErrCanceled, "the command %s was cancelled", run.r.id)
	}
	run.endReports(failure)
	run.r.abort()
	return failure
}

// revocation returns the error with which revoke has ended the handler's ctx, or nil.
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

// check reads the record, and calls revoke if it says that the command was cancelled or taken over. It reports false if the
// record can't be read.
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

// writeProgress writes the latest report, at intervals, until an interval has passed without a new report, or the handler has
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
		// To the sender, CANCELED means that somebody has called Job.Cancel.
		internal := newError(ErrInternal, "the handler returned an error as if the command had been cancelled, which it was not: %s",
			failure.Message)
		internal.Source, failure = failure.Source, internal
	}
	switch {
	case lost != nil:
		run.giveUp(lost)
	case failure == nil:
		run.complete(data)
	case src.svc.base.Err() != nil || r.fenced: // Stop has cancelled the handler, or another instance leads
		run.requeue()
	case r.retryAfter != nil:
		run.retryLater(failure.cut(), r.retryAfter.pause)
	default:
		run.retryOrFail(failure.cut())
	}
}

// complete writes the result.
func (run *commandRun) complete(data []byte) {
	codec := cmp.Or(run.r.codec, run.src.svc.cfg.codec) // r has none if middleware answered
	if p := run.reported.Swap(nil); p != nil {
		run.rec.Message = p.Message
	}
	run.rec.Percent = 100
	run.rec.State, run.rec.Result, run.rec.Type, run.rec.Error = stateCompleted, data, codec.ContentType(), nil
	run.writeAndAcknowledge(ack)
}

// retryLater has the command handled again after a pause, as the same attempt, because the handler has returned RetryAfter.
func (run *commandRun) retryLater(failure *Error, pause time.Duration) {
	run.rec.State, run.rec.Error = stateRetrying, failure
	run.rec.Attempt--
	run.src.logOften(run.r, slog.LevelInfo, "a command is handled again later", "error", failure, "pause", pause)
	run.writeAndAcknowledge(nakAfter(pause))
}

// retryOrFail has the command handled again after a pause, unless this was the last attempt.
func (run *commandRun) retryOrFail(failure *Error) {
	cfg := run.src.cfg
	run.rec.Error = failure
	if run.rec.Failures++; run.r.permanent || run.rec.Failures+run.rec.Crashes >= cfg.attempts {
		run.fail(failure)
		return
	}
	run.rec.State = stateRetrying
	pause := backoff(run.rec.Failures, cfg.backoff, cfg.maxBackoff)
	run.src.logOften(run.r, slog.LevelWarn, "an attempt failed", "error", failure, "attempt", run.rec.Attempt, "pause", pause)
	run.writeAndAcknowledge(nakAfter(pause))
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

// writeAndAcknowledge writes the record, and then acknowledges the message with how: ack after an outcome, or a nak with a pause
// before the next attempt. It retries, and keeps the message, until the record is written, the command is lost, or Stop's time is
// up.
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

// requeue writes the record as queued, and gives the message back, so that another instance begins at once. If the command was
// claimed, the attempt does not count.
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

// giveUp ends the run without an outcome: another instance has taken the command over, it was cancelled, or its record could
// not be written. giveUp acknowledges the message only if the command was cancelled. Otherwise the server redelivers the
// message after the ack wait, unless the instance that has the command acknowledges it.
func (run *commandRun) giveUp(why *Error) {
	if why.Code == ErrCanceled.Code {
		run.src.acknowledge(run.r.in, ack)
		return
	}
	run.src.logger(run.r).Warn("the outcome of a command was not stored", "error", why)
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
	next.Source = d.Header.Get(headerSource)
	next.Digest = cmp.Or(d.Header.Get(headerDigest), rec.Digest)
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
