package aegis

// This file is tracked commands: work that is queued, handled by one instance at a time, reports its progress, can be
// cancelled, and has one outcome, which is kept.
//
// The record of a command, in the bucket aegis_commands, is the truth; every change of it is a compare-and-set. The message in
// the work queue AEGIS_COMMANDS carries its data, and wakes a worker up. The server republishes each change of a record to
// whoever follows it.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

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

// AtPriority sets a command's priority. The default is [Normal]. Of the commands that wait for an instance, the more urgent
// ones start first, but for one start in 16, so that none waits forever.
func AtPriority(p Priority) CallOption {
	return func(c *callConfig) {
		c.check(c.kind == kindCommand, "AtPriority(%d): only commands have one", p)
		c.check(p >= Normal && p <= Critical, "AtPriority(%d): want Low, Normal, High or Critical", p)
		c.priority = p
	}
}

// A Command is what a handler of [HandleCommand] is called with.
type Command[T any] struct {
	ID       string // what [IdempotencyKey] set, else a random one
	Source   string // the service that sent it, by its own account
	Priority Priority
	Attempt  int      // counts from 1, crashes included
	Fence    uint64   // rises with each attempt: a store that remembers the highest can refuse an instance that was given up
	Last     Progress // what the attempt before this one reported last
	Data     T

	run *run
}

// Progress is the state of a command at a moment.
type Progress struct {
	State   string  // queued, running, retrying; or in the end completed, failed or canceled
	Percent float64 // 0 to 100
	Message string
	Attempt int
	Time    time.Time
}

// The states of a command.
const (
	queued    = "queued"
	running   = "running"
	retrying  = "retrying"
	completed = "completed"
	failed    = "failed"
	canceled  = "canceled"
)

const (
	commandStream = "AEGIS_COMMANDS"
	commandPrefix = "commands."
	recordBucket  = "aegis_commands"
	recordPrefix  = "$KV." + recordBucket + "."
	updatePrefix  = "aegis.jobs." // where changes of records are republished

	resultTTL        = 24 * time.Hour
	progressInterval = 100 * time.Millisecond // between writes of progress
	maxProgress      = 1 << 10                // bytes of its message
	followInterval   = 10 * time.Second       // between looks at a record, in case that a message was lost
)

func (s *Service) commandStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:      commandStream,
		Subjects:  []string{commandPrefix + "*.*", commandPrefix + "*.*.*"},
		Retention: jetstream.WorkQueuePolicy,
		Replicas:  s.cfg.replicas,
	}
}

// recordStream is the bucket, whose changes are republished.
func (s *Service) recordStream() jetstream.StreamConfig {
	config := s.bucket(recordBucket)
	config.AllowMsgTTL = true
	config.RePublish = &jetstream.RePublish{Source: recordPrefix + ">", Destination: updatePrefix + ">"}
	return config
}

// A record is all that is known of a command but its data.
type record struct {
	State    string    `json:"state"`
	Percent  float64   `json:"percent,omitempty"`
	Message  string    `json:"message,omitempty"`
	Attempt  int       `json:"attempt,omitempty"`
	Time     time.Time `json:"time"`
	Priority Priority  `json:"priority,omitempty"`
	Source   string    `json:"source,omitempty"`
	Digest   string    `json:"digest"`             // of the data
	Failures int       `json:"failures,omitempty"` // attempts that failed
	Crashes  int       `json:"crashes,omitempty"`  // attempts that ended without a word
	Owner    string    `json:"owner,omitempty"`    // the instance that may change it
	Wake     uint64    `json:"wake,omitempty"`     // the sequence of the message that it was claimed by
	Nonce    string    `json:"nonce"`              // of this change
	Result   []byte    `json:"result,omitempty"`
	Type     string    `json:"type,omitempty"` // of Result
	Error    *Error    `json:"error,omitempty"`
}

func (r *record) final() bool {
	return r.State == completed || r.State == failed || r.State == canceled
}

func (r *record) progress() Progress {
	return Progress{State: r.State, Percent: r.Percent, Message: r.Message, Attempt: r.Attempt, Time: r.Time}
}

// recordKey is <service>.<command>.<id>, whatever characters the id has.
func recordKey(service, command, id string) string {
	if !isToken(id, maxIDLength) {
		id = "=" + base64.RawURLEncoding.EncodeToString([]byte(id))
	}
	return service + "." + command + "." + id
}

// writeRecord replaces the record of this revision; 0 means that there is none. If that is not the latest any more, it returns
// what is.
func (s *Service) writeRecord(ctx context.Context, key string, rec *record, revision uint64, cfg *callConfig) (now *record, at uint64, failure *Error) {
	rec.Nonce, rec.Time = rand.Text(), time.Now().UTC()
	data, err := MsgPack.Marshal(rec)
	if err != nil {
		return nil, 0, asError(err)
	}
	x := &exchange{subject: recordPrefix + key, data: data, header: nats.Header{jetstream.ExpectedLastSubjSeqHeader: {strconv.FormatUint(revision, 10)}}}
	if rec.final() {
		x.header[jetstream.MsgTTLHeader] = []string{resultTTL.String()}
	}
	_, failure = s.persist(ctx, x, cfg, nil, func() (*nats.Msg, *Error, bool) {
		seq, failure := s.store(ctx, x, s.recordStream())
		if failure == nil {
			now, at = rec, seq
		} else if failure.Code == conflict.Code {
			var unread *Error
			if now, at, unread = s.readRecord(ctx, nil, key); unread != nil {
				return nil, unread, mayPass(unread)
			}
			if now != nil && now.Nonce == rec.Nonce { // its confirmation was lost
				failure = nil
			}
		}
		return nil, failure, mayPass(failure)
	})
	return now, at, failure
}

// readRecord asks the bucket's leader for the latest record, nil if there is none; on a certain connection, if c is not nil.
func (s *Service) readRecord(ctx context.Context, c *conn, key string) (*record, uint64, *Error) {
	data, revision, failure := s.readKey(ctx, c, recordBucket, key)
	if failure != nil || data == nil {
		return nil, revision, failure
	}
	rec := &record{}
	if err := MsgPack.Unmarshal(data, rec); err != nil {
		return nil, 0, newError(ErrInternal, "the record of %s can't be read: %v", key, err)
	}
	return rec, revision, nil
}

// Sending.

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
	cfg := newCallConfig(kindCommand, opts)
	if failure := cmp.Or(checkNames(service, kindCommand, command), cfg.err); failure != nil {
		return nil, failure
	}
	payload, buf, err := marshal(s.cfg.codec, &data)
	if err != nil {
		return nil, notRun(newError(ErrInvalid, "encoding the command %s.%s: %v", service, command, err))
	}
	id := cmp.Or(cfg.key, rand.Text())
	if failure := s.sendCommand(ctx, service, command, id, payload, buf, cfg); failure != nil {
		return nil, failure
	}
	return Attach[R](s, service, command, id), nil
}

func (s *Service) sendCommand(ctx context.Context, service, command, id string, data []byte, buf *packer, cfg *callConfig) *Error {
	key, subject := recordKey(service, command, id), commandPrefix+service+"."+command
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
	if running, sv, failure := s.serving(ctx, service, "", subject); failure == nil && len(running) > 0 && sv == nil {
		return notRun(newError(ErrUnimplemented, "instances of %s run, but none handles the command %s", service, command))
	}
	rec := &record{State: queued, Priority: cfg.priority, Source: s.name, Digest: digest(header, data)}
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
	if failure != nil && failure.NotRun && cfg.key == "" { // nobody can send it again: let its record expire
		rec.State = canceled
		_, _, _ = s.writeRecord(ctx, key, rec, revision, callConfigs[kindCommand])
	}
	return failure
}

// wake publishes what makes a worker look at a record that is queued.
func (s *Service) wake(ctx context.Context, subject, key string, revision uint64, header nats.Header, data []byte, buf *packer, cfg *callConfig) *Error {
	header = withHeader(header, jetstream.MsgIDHeader, key+"@"+strconv.FormatUint(revision, 10))
	return s.keep(ctx, &exchange{subject: subject, header: header, data: data}, s.commandStream(), cfg, buf)
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
			if failure != errDropped && !mayPass(failure) {
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
			sl.await(clock() + look)
			select {
			case m := <-sl.answers:
				if m == nil {
					if failure := s.over(c, sl, sl.sub.Subject); failure != nil && failure.Code != ErrTimeout.Code {
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

// Handling.

// HandleCommand executes a command: fn is called with its data, on a goroutine of the library, up to [Concurrency] at once in
// each instance. command is [A-Za-z][A-Za-z0-9_]*. fn's ctx ends after [Deadline], when the command is cancelled, when another
// instance had to take over, or when Stop's time is up.
//
// What is guaranteed: a command has one outcome, and once it has, fn is not called again. What isn't: that fn is called once.
// After an error it is called again, after a pause ([Backoff]), up to [Attempts] times in all, a crash counting as one; and an
// instance that was given up, since it was paused or cut off, may still be at it for a moment. So let effects elsewhere take
// Command.ID or Command.Fence. After the last attempt the command has failed, and is set aside as a dead letter; data that
// can't be decoded into T fails at once. What Stop cuts short is queued again, and uses up no attempt. The result must fit the
// server's max_payload.
//
// The errors are those of [Subscribe].
func HandleCommand[T, R any](s *Service, command string, fn func(context.Context, *Command[T]) (R, error), opts ...HandlerOption) error {
	if fn == nil {
		return newError(ErrInvalid, "command %q: its function is nil", command)
	}
	return s.handleCommand(command, func(ctx context.Context, m *Message) ([]byte, error) {
		cmd := &Command[T]{}
		r, err := decode(ctx, m, &cmd.Data)
		if err != nil {
			return nil, err
		}
		run := r.run
		cmd.run, cmd.ID, cmd.Source = run, run.id, m.Source
		cmd.Priority, cmd.Attempt, cmd.Fence, cmd.Last = run.priority, run.attempt, run.fence, run.last
		result, err := fn(ctx, cmd)
		if err != nil {
			return nil, err
		}
		data, _, err := marshal(r.codec, &result)
		if err != nil {
			return nil, newError(ErrInternal, "encoding the result of %s: %v", command, err)
		}
		return data, nil
	}, opts)
}

func (s *Service) handleCommand(command string, fn HandlerFunc, opts []HandlerOption) error {
	if failure := checkNames(s.name, kindCommand, command); failure != nil {
		return failure
	}
	cfg, err := s.handlerConfig(kindCommand, opts)
	if err != nil {
		return err
	}
	e := &endpoint{kind: kindCommand, name: command, subject: commandPrefix + s.name + "." + command, run: fn, spare: letterRoom}
	var lanes []*lane
	for _, level := range levels {
		suffix := suffixes[level]
		lanes = append(lanes, newLane(s.name+"~"+command+strings.Replace(suffix, ".", "~", 1), e.subject+suffix))
	}
	ex := &executions{feed: newFeed(e, cfg, s.commandStream(), lanes...), owner: rand.Text()}
	ex.look = ex.checkAll
	e.source = ex
	return s.register(e, cfg)
}

// executions is where an endpoint's commands come from.
type executions struct {
	*feed

	checking atomic.Bool
	owner    string   // its name in records
	runs     sync.Map // string -> *run, by key
}

// A run is one attempt at a command.
type run struct {
	ex       *executions
	key      string
	id       string
	r        *request
	priority Priority // this and the next are claim's
	attempt  int
	fence    uint64
	last     Progress
	claimed  atomic.Bool

	turn     sync.Mutex // guards the next three, also while the record is written: one change after the other
	rec      record
	revision uint64
	returned bool // the record says that it is queued, since Stop's time is up

	mu      sync.Mutex // guards the rest
	pending *Progress  // to be written
	writing bool       // writeProgress runs
	lost    *Error     // why it is this run's no more

	over context.Context // ends when no more reports are taken
	end  context.CancelFunc
}

func (ex *executions) open(ctx context.Context) error {
	if failure := ex.svc.patiently(ctx, func(ctx context.Context) *Error {
		_, failure := ex.svc.provide(ctx, ex.svc.recordStream(), recordPrefix+">")
		return failure
	}); failure != nil {
		return failure
	}
	ex.svc.probe(recordPrefix+recordKey(ex.svc.name, ex.name, "probe"), readSubject(recordBucket))
	return ex.feed.open(ctx)
}

// serve handles one command.
func (ex *executions) serve(m *nats.Msg, arrived time.Time) {
	defer ex.release()
	d, id := ex.delivery(m), m.Header.Get(headerID)
	if d == nil || id == "" {
		ex.svc.log.Warn("what was no command was dropped", "endpoint", ex.name, "correlation_id", m.Header.Get(headerCorrelation), "subject", m.Subject)
		ex.tell(m, "+TERM")
		return
	}
	x := &run{ex: ex, key: recordKey(ex.svc.name, ex.name, id), id: id}
	x.over, x.end = context.WithCancel(context.Background())
	d.id = id
	x.r = ex.newRequest(m, d, arrived)
	x.r.run = x
	if ex.svc.draining.Load() || !ex.admit(x.r) {
		ex.tell(m, ex.returned())
		return
	}
	if _, busy := ex.runs.LoadOrStore(x.key, x); busy { // delivered again since the server didn't hear that it runs
		return
	}
	defer ex.runs.Delete(x.key)
	notice := commandPrefix + x.key
	ex.svc.cancels.add(notice, func() { ex.keeping.Go(func() { x.check() }) })
	defer ex.svc.cancels.remove(notice)
	if x.claim() {
		ex.dispatch(x.r)
	}
}

// claim makes the command this run's. Otherwise it has seen to the message.
func (x *run) claim() bool {
	ex := x.ex
	x.turn.Lock()
	defer x.turn.Unlock()
	ctx, cancel := context.WithTimeout(ex.svc.base, 5*time.Second)
	defer cancel()
	rec, revision, failure := ex.svc.readRecord(ctx, nil, x.key)
	for failure == nil || failure.Code == conflict.Code {
		sequence := x.r.delivery.sequence
		if rec == nil || rec.final() || rec.Wake != 0 && rec.Wake != sequence && rec.State != queued { // woken up twice: another message stands for it
			ex.tell(x.r.in, "+ACK")
			return false
		}
		x.rec, x.revision = *rec, revision
		if rec.State == running && rec.Owner == ex.owner { // claimed just now, but the confirmation was lost
			x.rec.Attempt--
		} else if rec.State == running { // by one that is no more, or was given up
			x.rec.Crashes++
		}
		if x.rec.Failures+x.rec.Crashes >= ex.cfg.attempts {
			last := x.rec.Error
			if last == nil {
				last = newError(ErrInternal, "its handler began %d times and never finished: it crashed or hung, or its instance lost the connection", x.rec.Crashes)
				last.Source = ex.svc.name
				ex.meter.ended(x.r.msg.Source, last)
			}
			x.fail(last)
			return false
		}
		x.last = rec.progress()
		x.rec.State, x.rec.Owner, x.rec.Wake = running, ex.owner, sequence
		x.rec.Attempt++
		rec, revision, failure = ex.svc.writeRecord(ctx, x.key, &x.rec, revision, callConfigs[kindCommand])
		if failure == nil {
			x.revision, x.fence, x.attempt, x.priority = revision, revision, x.rec.Attempt, x.rec.Priority
			x.claimed.Store(true)
			return true
		}
	}
	ex.logger(x.r).Warn("a command can't be claimed", "error", failure)
	ex.tell(x.r.in, nakAfter(backoff(x.r.delivery.attempt, fetchTick, 5*time.Second)))
	return false
}

// write changes the record. If it is this run's no more, it ends the handler's ctx.
func (x *run) write(ctx context.Context) *Error {
	x.mu.Lock()
	p := x.pending
	if p != nil {
		x.rec.Percent, x.rec.Message, x.pending = p.Percent, p.Message, nil
	}
	x.mu.Unlock()
	cfg := *callConfigs[kindCommand]
	cfg.sticky = true
	for {
		now, revision, failure := x.ex.svc.writeRecord(ctx, x.key, &x.rec, x.revision, &cfg)
		switch {
		case failure == nil:
			x.revision = revision
			return nil
		case failure.Code != conflict.Code:
			x.mu.Lock()
			if x.pending == nil {
				x.pending = p
			}
			x.mu.Unlock()
			return failure
		case now == nil || now.Owner != x.ex.owner || now.State == canceled:
			return x.lose(now)
		}
		x.revision = revision // the confirmation of an earlier write was lost
	}
}

// lose notes who the command belongs to now.
func (x *run) lose(now *record) *Error {
	lost := newError(ErrFenced, "another instance has taken over the command %s", x.id)
	if now != nil && now.State == canceled {
		lost = newError(ErrCanceled, "the command %s was cancelled", x.id)
	}
	x.mu.Lock()
	x.lost = lost
	x.mu.Unlock()
	x.r.abort()
	return lost
}

// whyLost is nil as long as the command is this run's.
func (x *run) whyLost() *Error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.lost
}

// checkAll looks after all runs, in case that the notice of a cancellation was lost.
func (ex *executions) checkAll() {
	if !ex.checking.CompareAndSwap(false, true) {
		return
	}
	ex.keeping.Go(func() {
		defer ex.checking.Store(false)
		for _, x := range ex.atWork() {
			if !x.check() {
				return
			}
		}
	})
}

func (ex *executions) atWork() (runs []*run) {
	ex.runs.Range(func(_, x any) bool {
		runs = append(runs, x.(*run))
		return true
	})
	return runs
}

// check looks whether the command is still this run's; not ok if that can't be told.
func (x *run) check() bool {
	ctx, cancel := context.WithTimeout(x.ex.svc.base, 5*time.Second)
	defer cancel()
	claimed := x.claimed.Load() // before it is read
	now, _, failure := x.ex.svc.readRecord(ctx, nil, x.key)
	if failure == nil && now != nil && (now.State == canceled || claimed && now.Owner != x.ex.owner) {
		x.lose(now)
	}
	return failure == nil
}

// Progress reports how far the command is, to those who follow it and, after a crash, to the next attempt. percent is 0 to 100.
// It doesn't block; message is cut after 1,024 bytes; reports that follow each other within 0.1 s are combined into the last.
// The error tells that going on is of no use: [ErrCanceled] if the command was cancelled, [ErrFenced] if another instance has
// taken over; or [ErrInvalid] for another percent.
func (c *Command[T]) Progress(percent float64, message string) error {
	if !(percent >= 0 && percent <= 100) {
		return newError(ErrInvalid, "Progress(%v): want 0 to 100", percent)
	}
	message = message[:min(len(message), maxProgress)]
	if c.run == nil {
		return newError(ErrInvalid, "Progress: the command is not from HandleCommand")
	}
	return c.run.report(Progress{Percent: percent, Message: message}).orNil()
}

func (x *run) report(p Progress) *Error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.lost != nil {
		return x.lost
	}
	if x.over.Err() != nil {
		return newError(ErrInvalid, "Progress: the handler has returned")
	}
	x.pending = &p
	if !x.writing {
		x.writing = true
		x.ex.keeping.Go(x.writeProgress)
	}
	return nil
}

// writeProgress writes what is pending, with pauses, until there is nothing or the handler has returned: then the last write
// takes it along.
func (x *run) writeProgress() {
	for {
		x.mu.Lock()
		if x.pending == nil || x.lost != nil || x.over.Err() != nil {
			x.writing = false
			x.mu.Unlock()
			return
		}
		x.mu.Unlock()
		ctx, cancel := context.WithTimeout(x.ex.svc.base, 5*time.Second)
		x.turn.Lock()
		if failure := x.write(ctx); failure != nil {
			x.ex.logger(x.r).Warn("progress was not written", "error", failure)
		}
		x.turn.Unlock()
		cancel()
		sleep(x.over, progressInterval)
	}
}

// done writes the outcome, or what is next.
func (ex *executions) done(r *request, data []byte, failure *Error) { r.run.finish(data, failure) }

func (x *run) finish(data []byte, failure *Error) {
	x.end()
	x.turn.Lock()
	defer x.turn.Unlock()
	svc, r, lost := x.ex.svc, x.r, x.whyLost()
	if lost == nil && failure == nil {
		codec := cmp.Or(r.codec, svc.cfg.codec) // middleware may have answered
		x.rec.State, x.rec.Result, x.rec.Type, x.rec.Error = completed, data, codec.ContentType(), nil
	}
	stopped := svc.base.Err() != nil || r.fenced
	if failure != nil {
		failure = failure.cut()
		failure.Source = svc.name
		if !stopped {
			x.rec.Error = failure
			x.rec.Failures++
		}
	}
	switch {
	case lost != nil:
		x.concede(lost)
	case failure == nil:
		if x.returned {
			x.rec.Attempt++
		}
		x.conclude("+ACK")
	case stopped:
		x.giveBack()
	case r.hopeless || x.rec.Failures+x.rec.Crashes >= x.ex.cfg.attempts:
		x.fail(failure)
	default:
		x.rec.State = retrying
		pause := backoff(x.rec.Failures, x.ex.cfg.backoff, x.ex.cfg.maxPause)
		x.ex.logger(r).Warn("an attempt failed", "error", failure, "attempt", x.rec.Attempt, "pause", pause)
		x.conclude(nakAfter(pause))
	}
}

// conclude writes the record and, if it is still this run's, acknowledges the message one way or the other.
func (x *run) conclude(how string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if failure := x.write(ctx); failure != nil {
		x.concede(failure)
		return
	}
	x.ex.tell(x.r.in, how)
}

// concede leaves the message alone, since another instance has it now, unless the command was cancelled.
func (x *run) concede(failure *Error) {
	if failure.Code == ErrCanceled.Code {
		x.ex.tell(x.r.in, "+ACK")
		return
	}
	x.ex.logger(x.r).Warn("what became of a command was not stored", "error", failure)
}

// fail sets the command aside. First the dead letter, then the outcome: after a crash in between both are done again.
func (x *run) fail(failure *Error) {
	x.end() // lest interrupt waits for this
	if !x.ex.bury(x.r, failure, x.rec.Failures+x.rec.Crashes) {
		x.giveBack()
		return
	}
	x.rec.State, x.rec.Error = failed, failure
	x.conclude("+ACK")
}

// giveBack queues the command again, as if this attempt had not been.
func (x *run) giveBack() {
	x.ex.svc.returning.Add(1)
	defer x.ex.svc.returning.Add(-1)
	if failure := x.requeue(); failure != nil {
		x.concede(failure)
		return
	}
	x.ex.tell(x.r.in, x.ex.returned())
}

// requeue does so in the record, unless it says so already.
func (x *run) requeue() *Error {
	if x.returned {
		return nil
	}
	before := x.rec
	x.rec.State = queued
	if x.attempt > 0 {
		x.rec.Attempt--
	}
	ctx, cancel := context.WithTimeout(context.Background(), returnTimeout)
	defer cancel()
	failure := x.write(ctx)
	if x.returned = failure == nil; !x.returned {
		x.rec = before
	}
	return failure
}

// interrupt gives all commands back in their records; their messages follow when their handlers return.
func (ex *executions) interrupt() {
	var all sync.WaitGroup
	for _, x := range ex.atWork() {
		all.Go(func() {
			for begin := clock(); !x.turn.TryLock(); time.Sleep(time.Millisecond) {
				if x.ended() || clock()-begin > cancelGrace {
					return // it sees to itself, or has to do without
				}
			}
			defer x.turn.Unlock()
			if !x.ended() && x.attempt > 0 {
				_ = x.requeue() // else its message is given back later
			}
		})
	}
	all.Wait()
}

// ended tells that there is nothing to give back.
func (x *run) ended() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.over.Err() != nil || x.lost != nil
}

// redriveCommand queues a command again that has failed.
func (s *Service) redriveCommand(ctx context.Context, d DeadLetter) *Error {
	tokens := strings.Split(d.Subject, ".")
	id := d.Header.Get(headerID)
	if len(tokens) < 3 || id == "" {
		return notRun(newError(ErrInvalid, "Redrive: %s with id %q is no command", d.Subject, id))
	}
	key := recordKey(tokens[1], tokens[2], id)
	rec, revision, failure := s.readRecord(ctx, nil, key)
	if failure != nil {
		return failure
	}
	next := record{State: queued, Digest: digest(d.Header, d.Data), Source: d.Header.Get(headerSource)}
	if rec != nil {
		next.Priority, next.Attempt = rec.Priority, rec.Attempt
	}
	switch {
	case rec != nil && rec.State == queued && rec.Digest == next.Digest: // by a Redrive that may not have come further
	case rec != nil && rec.State != failed:
		return notRun(newError(ErrInvalid, "Redrive: the command %s is %s: only one that failed is queued again", id, rec.State))
	default:
		if _, revision, failure = s.writeRecord(ctx, key, &next, revision, callConfigs[kindCommand]); failure != nil && failure.Code == conflict.Code {
			return notRun(newError(ErrUnavailable, "Redrive: the command %s was changed by someone else just now: try again", id))
		} else if failure != nil {
			return failure
		}
	}
	return s.wake(ctx, d.Subject, key, revision, copyHeader(d.Header), d.Data, nil, callConfigs[kindCommand])
}
