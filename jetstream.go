package aegis

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has what aegis does with JetStream besides the feed and the watch: it makes and checks streams and buckets, stores
// messages, reads keys and writes them by compare-and-swap.

// openStream returns the stream that want describes, when it has checked that the stream can be used and takes all of subjects.
// It makes the stream if there is none. A stream that exists belongs to its operator: it is used as it is, or refused.
func (s *Service) openStream(
	ctx context.Context, want jetstream.StreamConfig, subjects ...string,
) (stream jetstream.Stream, failure *Error) {
	failure = s.retryTimeouts(ctx, func(ctx context.Context) (failure *Error) {
		stream, failure = s.openStreamOnce(ctx, want, subjects...)
		return failure
	})
	return stream, failure
}

// openStreamOnce is openStream without retries: it sends each request to the server once, and gives up when ctx ends.
func (s *Service) openStreamOnce(
	ctx context.Context, want jetstream.StreamConfig, subjects ...string,
) (jetstream.Stream, *Error) {
	begin, c := clock(), s.pick()
	if c == nil {
		return nil, s.disconnectedError()
	}
	stream, err := c.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		made := want
		if want.Name == eventStream || want.Name == commandStream { // one that exists need not have these
			made.AllowMsgSchedules, made.AllowRollup, made.AllowMsgTTL = true, true, true
		}
		made.MaxConsumers = consumerLimit
		if stream, err = c.js.CreateStream(ctx, made); errors.Is(err, jetstream.ErrMaximumConsumersLimit) { // of the account
			made.MaxConsumers = 0
			stream, err = c.js.CreateStream(ctx, made)
		}
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			// Another instance was faster.
			if stream, err = c.js.Stream(ctx, want.Name); errors.Is(err, jetstream.ErrStreamNotFound) {
				// The cluster has not finished.
				return nil, newError(ErrTimeout, "the stream %s is being made by another instance", want.Name)
			}
		}
	}
	if err != nil {
		return nil, s.jetStreamError(begin, err, "the stream "+want.Name)
	}
	have := stream.CachedInfo().Config
	missing := slices.IndexFunc(subjects, func(subject string) bool { return !takes(stream, subject) })
	var fix string
	switch {
	case have.NoAck:
		fix = "it has to confirm what it stores: set no_ack to false"
	case have.Retention == jetstream.WorkQueuePolicy && want.Retention != have.Retention:
		fix = "its retention is workqueue, but several consumers need each message: set it to limits"
	case want.Retention == jetstream.WorkQueuePolicy && want.Retention != have.Retention:
		fix = "its retention has to be workqueue"
	case want.RePublish != nil && (have.RePublish == nil || have.RePublish.Destination != want.RePublish.Destination):
		fix = "it has to republish " + want.RePublish.Source + " to " + want.RePublish.Destination
	case want.AllowMsgTTL && !have.AllowMsgTTL:
		fix = "set allow_msg_ttl"
	case want.SubjectDeleteMarkerTTL > 0 && have.SubjectDeleteMarkerTTL == 0:
		fix = "set subject_delete_marker_ttl, such as 1h, so that other instances learn what has expired"
	case missing >= 0:
		add := want.Subjects[max(slices.IndexFunc(want.Subjects, func(p string) bool { return covers(p, subjects[missing]) }), 0)]
		fix = "it does not take " + subjects[missing] + ": add " + add + " to its subjects"
	default:
		return stream, nil
	}
	return nil, notRun(newError(ErrInvalid, "the stream %s, which exists, can't be used: %s", want.Name, fix))
}

// consumerLimit is the number of consumers that a stream made by aegis may have, because the default of nats-server is 1,000.
// Each subscription is one, and each service that an instance looks up, and each group in which it campaigns.
const consumerLimit = 1 << 20

// takes reports whether all subjects of a pattern go to the stream.
func takes(stream jetstream.Stream, subject string) bool {
	return slices.ContainsFunc(stream.CachedInfo().Config.Subjects, func(p string) bool { return covers(p, subject) })
}

const apiTimeout = 2 * time.Second // for an answer from JetStream, before it is asked again

// retryTimeouts calls ask until it succeeds or fails with another error than ErrTimeout, because a cluster that is electing a
// leader does not answer for a while. It gives up when ctx ends or, if ctx has no deadline, after WithTimeout.
func (s *Service) retryTimeouts(ctx context.Context, ask func(ctx context.Context) *Error) *Error {
	ctx, cancel := withDeadline(ctx, s.cfg.timeout)
	defer cancel()
	for n := 1; ; n++ {
		attemptCtx, cancel := context.WithTimeout(ctx, apiTimeout)
		failure := ask(attemptCtx)
		cancel()
		if failure == nil || failure.Code != ErrTimeout.Code || !sleep(ctx, backoff(n, 50*time.Millisecond, time.Second)) {
			return failure
		}
	}
}

// askJetStream is retryTimeouts for a function that uses the jetstream package. It converts the function's error into an Error,
// whose text begins with what.
func (s *Service) askJetStream(ctx context.Context, what string, ask func(context.Context, jetstream.JetStream) error) *Error {
	return s.retryTimeouts(ctx, func(ctx context.Context) *Error {
		begin, c := clock(), s.pick()
		if c == nil {
			return s.disconnectedError()
		}
		if err := ask(ctx, c.js); err != nil {
			return s.jetStreamError(begin, err, what)
		}
		return nil
	})
}

// askStream is askJetStream for a function that uses the stream called name.
func (s *Service) askStream(ctx context.Context, name, what string, ask func(context.Context, jetstream.Stream) error) *Error {
	return s.askJetStream(ctx, what, func(ctx context.Context, js jetstream.JetStream) error {
		stream, err := js.Stream(ctx, name)
		if err == nil {
			err = ask(ctx, stream)
		}
		return err
	})
}

// stored yields what item makes of the messages of a stream that match subject and are stored when it begins, the oldest first.
// It reads them one by one, and leaves out those for which item reports false. If a read fails, it yields the error and ends.
func stored[T any](
	ctx context.Context, s *Service, name, subject string, item func(*jetstream.RawStreamMsg) (T, bool),
) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var stream jetstream.Stream
		for next := uint64(1); ; next++ {
			var m *jetstream.RawStreamMsg
			failure := s.askJetStream(ctx, "the stream "+name, func(ctx context.Context, js jetstream.JetStream) (err error) {
				if stream == nil {
					stream, err = js.Stream(ctx, name)
				}
				if err == nil {
					m, err = stream.GetMsg(ctx, next, jetstream.WithGetMsgSubject(subject))
				}
				return err
			})
			switch {
			case failure != nil && failure.Code != ErrNotFound.Code: // there may be no such stream, or no more messages in it
				yield(*new(T), failure)
				return
			case failure != nil || m.Sequence > stream.CachedInfo().State.LastSeq:
				return
			}
			if v, ok := item(m); ok && !yield(v, nil) {
				return
			}
			next = m.Sequence
		}
	}
}

// Codes of the JetStream API that nats.go does not name; all of them are in
// https://github.com/nats-io/nats-server/blob/main/server/errors.json.
const (
	accountResources       = 10002 // the account's quota of storage is used up
	noSuitablePeers        = 10005 // from a cluster that is not complete
	temporarilyUnavailable = 10008 // from a cluster without a leader
	inProcess              = 10158 // a message with the same id is being stored
	maxStreams             = 10027
	invalidStreamConfig    = 10052
	replicasNotSupported   = 10074 // more than one, without a cluster
	streamSealed           = 10109
	noAccountLimits        = 10120 // the account has no quota for that number of replicas
	moveInProgress         = 10124
	memberChangeInProgress = 10202
	reconfiguring          = 10226
)

// kindOfAPIError returns the sentinel for an error of JetStream. The status that the server gives does not always fit: a
// failure that may pass, or that only an operator can mend, is ErrUnavailable; only what the caller has to change is
// ErrInvalid.
func kindOfAPIError(e *jetstream.APIError) *Error {
	switch e.ErrorCode {
	case accountResources, maxStreams, streamSealed, noAccountLimits, moveInProgress, memberChangeInProgress, reconfiguring:
		return ErrUnavailable // although the status is 400
	case replicasNotSupported, invalidStreamConfig:
		return ErrInvalid // although the status is 500
	}
	if e.Code >= 500 || e.Code == 429 {
		return ErrUnavailable
	}
	return kindOf(strconv.Itoa(e.Code))
}

// jetStreamError returns the Error for an error of the jetstream package about a request that was sent at the time begin. The
// code is that of ErrTimeout if the request may be repeated.
func (s *Service) jetStreamError(begin time.Duration, err error, what string) *Error {
	var api *jetstream.APIError
	switch {
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount),
		errors.Is(err, nats.ErrNoResponders):
		return noJetStreamError(what)
	case errors.As(err, &api) && (api.ErrorCode == temporarilyUnavailable || api.ErrorCode == noSuitablePeers):
		return newError(ErrTimeout, "%s: %s (%d)", what, api.Description, api.ErrorCode)
	case errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeMaximumConsumersLimit:
		return notRun(newError(ErrUnavailable, "%s: %s (%d): raise max_consumers of the stream or the account",
			what, api.Description, api.ErrorCode))
	case errors.As(err, &api):
		return notRun(newError(kindOfAPIError(api), "%s: %s (%d)", what, api.Description, api.ErrorCode))
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrTimeout):
		// The cause may be permissions that deny the request or its answer, because the server does not answer then.
		denied := s.denials.since(begin, toPublish+"$JS.>", toSubscribe+s.conns[0].nc.Opts.InboxPrefix+".>", tooMany)
		return cmp.Or(denied, newError(ErrTimeout, "%s: no answer from JetStream: %v", what, err))
	case errors.Is(err, context.Canceled):
		return newError(ErrCanceled, "%s: %v", what, err)
	}
	return newError(ErrUnavailable, "%s: %v", what, err)
}

// noJetStreamError returns the error for a server or an account without JetStream.
func noJetStreamError(what string) *Error {
	return notRun(newError(ErrUnavailable, "%s: no JetStream: run nats-server with -js, and enable it for the account", what))
}

// storeWithRetries stores x in a stream, in as many attempts as cfg allows.
func (s *Service) storeWithRetries(ctx context.Context, x *exchange, stream jetstream.StreamConfig, cfg *callConfig) *Error {
	_, failure := s.withRetries(ctx, x, cfg, func() (*nats.Msg, *Error, bool) {
		_, failure := s.store(ctx, x, stream)
		return nil, failure, retryable(failure)
	})
	return failure
}

// store makes one attempt to store x in a stream, and returns its sequence. If there are no responders, it makes the stream and
// sends x again.
func (s *Service) store(ctx context.Context, x *exchange, stream jetstream.StreamConfig) (sequence uint64, failure *Error) {
	x.toStream = true
	answer, failure := s.request(ctx, x)
	if failure == errNoResponders {
		within, cancel := context.WithTimeout(ctx, x.until-clock())
		defer cancel()
		if _, failure = s.openStreamOnce(within, stream, x.subject); failure != nil {
			if failure.Code == ErrTimeout.Code {
				failure = newError(ErrUnavailable, "no stream takes %s at present: %s", x.subject, failure.Message)
			}
			return 0, notRun(failure)
		}
		answer, failure = s.request(ctx, x)
	}
	switch failure {
	case nil:
		return parsePubAck(answer, x.subject)
	case errNoResponders:
		return 0, noStreamError(x.subject)
	}
	if failure.Code == ErrTimeout.Code && !failure.NotRun {
		failure.Message += "; perhaps no stream takes it, which the server does not report if anybody else subscribes to it"
	}
	return 0, failure
}

// noStreamError returns the error for a message that got no responders, because no stream has its subject.
func noStreamError(subject string) *Error {
	return notRun(newError(ErrUnavailable, "no stream takes %s at present", subject))
}

// A pubAck is a stream's answer to a message that was to be stored.
type pubAck struct {
	jetstream.PubAck
	BatchID   string              `json:"batch"`
	BatchSize uint64              `json:"count"`
	Error     *jetstream.APIError `json:"error"`
}

// parsePubAck reads the stream's answer to a message that was to be stored: its sequence, or the reason why it was not stored.
func parsePubAck(answer *nats.Msg, subject string) (uint64, *Error) {
	var ack pubAck
	err := json.Unmarshal(answer.Data, &ack)
	switch refused := ack.Error; {
	case isNoResponders(answer):
		return 0, noStreamError(subject)
	case err != nil || refused == nil && ack.Stream == "":
		return 0, newError(ErrInternal, "the answer for %s is not from a stream: %.100q", subject, answer.Data)
	case refused == nil:
		return ack.Sequence, nil
	case refused.ErrorCode == inProcess:
		return 0, newError(ErrUnavailable, "%s was sent before and is not stored yet: %s (%d)",
			subject, refused.Description, refused.ErrorCode)
	case refused.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence,
		refused.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant: // from a replicated stream
		return 0, notRun(newError(errConflict, "%s was refused: %s (%d)", subject, refused.Description, refused.ErrorCode))
	default:
		return 0, notRun(newError(kindOfAPIError(refused), "%s was refused: %s (%d)", subject, refused.Description, refused.ErrorCode))
	}
}

// isPubAck reports whether m is the acknowledgement of a stream, as the server writes it. A stream that takes requests sends
// one to the reply subject before the handler can answer.
func isPubAck(m *nats.Msg) bool {
	if m.Header != nil || !bytes.HasPrefix(m.Data, []byte(`{"stream":"`)) && !bytes.HasPrefix(m.Data, []byte(`{"error":{`)) {
		return false
	}
	var ack pubAck
	d := json.NewDecoder(bytes.NewReader(m.Data))
	d.DisallowUnknownFields()
	return d.Decode(&ack) == nil && ack.Stream != "" && bytes.Contains(m.Data, []byte(`"seq":`))
}

// Key-value buckets.

// bucket returns the configuration of the stream that is the key-value bucket called name.
func (s *Service) bucket(name string) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: "KV_" + name, Subjects: []string{"$KV." + name + ".>"}, MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew,
		AllowRollup: true, DenyDelete: true, AllowDirect: true, Replicas: s.cfg.replicas,
	}
}

// readKey asks the leader of a bucket's stream for the latest value of a key. The value is nil if the key has none; the revision
// is then that of the deletion, or 0. readKey uses the connection c if that is not nil. It waits until ctx ends, but at most for
// WithTimeout.
func (s *Service) readKey(ctx context.Context, c *conn, bucket, key string) (value []byte, revision uint64, failure *Error) {
	ask, _ := json.Marshal(map[string]string{"last_by_subj": "$KV." + bucket + "." + key}) // a string can't fail
	x := &exchange{subject: readSubject(bucket), data: ask, on: c}
	answer, failure := s.request(ctx, x.within(ctx, s.cfg.timeout))
	what := "the key " + key + " of " + bucket
	if failure == errNoResponders {
		failure = noJetStreamError(what)
	}
	if failure != nil {
		return nil, 0, failure
	}
	var got struct {
		Message struct {
			Sequence uint64 `json:"seq"`
			Data     []byte `json:"data"`
		} `json:"message"`
		Error *jetstream.APIError `json:"error"`
	}
	switch err := json.Unmarshal(answer.Data, &got); {
	case err != nil:
		return nil, 0, newError(ErrInternal, "%s: %v", what, err)
	case got.Error != nil && got.Error.Code == 404:
		return nil, 0, nil
	case got.Error != nil:
		return nil, 0, s.jetStreamError(clock(), got.Error, what)
	case len(got.Message.Data) == 0: // deleted
		return nil, got.Message.Sequence, nil
	}
	return got.Message.Data, got.Message.Sequence, nil
}

// readSubject returns the subject of requests for the values of a bucket.
func readSubject(bucket string) string { return "$JS.API.STREAM.MSG.GET.KV_" + bucket }

// errConflict is the kind of the error for a compare-and-swap that came too late.
var errConflict = &Error{Code: "CONFLICT"}

// compareAndSwap stores x, the new value of a bucket's key, if revision is the key's latest; revision 0 means that the key has
// none. If that is not confirmed, it reads the key back: the value of x there means success. It returns the value and the
// revision that the key has in the end, as far as they are known. The failure is a conflict if another instance has changed the
// key. If x.on is set and there was no answer on it, compareAndSwap sets x.on to another connection, for the caller to use next.
func (s *Service) compareAndSwap(
	ctx context.Context, x *exchange, bucket jetstream.StreamConfig, revision uint64,
) (now []byte, at uint64, failure *Error) {
	x.header = withHeader(x.header, jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(revision, 10))
	switch at, failure = s.store(ctx, x, bucket); {
	case failure == nil:
		return x.data, at, nil
	case failure.Code == errConflict.Code: // perhaps because an earlier attempt to store x has succeeded
	case failure.NotRun:
		return nil, 0, failure
	case x.on != nil:
		x.on = s.pickOther(x.on)
	}
	name := strings.TrimPrefix(bucket.Name, "KV_")
	key := strings.TrimPrefix(x.subject, "$KV."+name+".")
	now, at, unread := s.readKey(ctx, x.on, name, key)
	switch {
	case unread != nil:
		if x.on != nil {
			x.on = s.pickOther(x.on)
		}
		unread.NotRun = failure.NotRun // x may have been stored even if the reading did not begin
		return nil, 0, unread
	case bytes.Equal(now, x.data):
		return now, at, nil
	case failure.Code != errConflict.Code && at != revision:
		failure = newError(errConflict, "the key %s of %s was changed by another instance", key, name)
	}
	return now, at, failure
}
