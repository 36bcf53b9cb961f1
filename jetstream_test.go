package aegis_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// shortenAckWait sets the ack wait of all consumers of a stream.
func shortenAckWait(tb testing.TB, srv *server.Server, stream string, wait time.Duration) {
	tb.Helper()
	st, err := manage(tb, srv).Stream(context.Background(), stream)
	if err != nil {
		tb.Fatal(err)
	}
	consumers := st.ListConsumers(context.Background())
	for info := range consumers.Info() {
		info.Config.AckWait = wait
		if _, err := st.UpdateConsumer(context.Background(), info.Config); err != nil {
			tb.Fatal(err)
		}
	}
	if err := consumers.Err(); err != nil {
		tb.Fatal(err)
	}
}

func TestExistingStreams(t *testing.T) {
	t.Parallel()
	try := func(name string, words []string, configs ...jetstream.StreamConfig) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			js := manage(t, srv)
			for _, c := range configs {
				if _, err := js.CreateStream(t.Context(), c); err != nil {
					t.Fatal(err)
				}
			}
			svc := newService(t, srv, "risk")
			var got journal[int]
			subscribe(t, svc, "order.*", into(&got))
			err := svc.Start(t.Context())
			if words != nil {
				fails(t, err, aegis.ErrInvalid, words...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			publish(t, svc, "order", "created", 1)
			got.wait(t, 1)
			for _, c := range configs {
				st, err := js.Stream(t.Context(), c.Name)
				if err != nil {
					t.Fatal(err)
				}
				if have := st.CachedInfo().Config; !slices.Equal(have.Subjects, c.Subjects) || have.MaxAge != c.MaxAge {
					t.Errorf("the stream was changed: %+v", have)
				}
			}
		})
	}
	try("an operator's", nil, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}, MaxAge: time.Hour})
	try("other subjects", []string{"AEGIS_EVENTS", "events.order.*", "events.>"}, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.payment.>"}})
	try("no acks", []string{"no_ack"}, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}, NoAck: true})
	try("a work queue", []string{"workqueue", "retention"}, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}, Retention: jetstream.WorkQueuePolicy})
	try("dead letters without TTL", nil, jetstream.StreamConfig{Name: "AEGIS_DEAD", Subjects: []string{"aegis.dead.>"}})
	try("another stream has the subjects", []string{"AEGIS_EVENTS", "overlap"}, jetstream.StreamConfig{Name: "OTHER", Subjects: []string{"events.order.>"}})
}

func TestEventsWithoutJetStream(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "risk")
	promptly(t, func() {
		if e := fails(t, aegis.Publish(t.Context(), svc, "order", "created", 1), aegis.ErrUnavailable, "JetStream", "-js"); !e.NotRun {
			t.Error("NotRun is not set")
		}
	})
	promptly(t, func() {
		fails(t, aegis.PublishBatch(t.Context(), svc, "order", "created", []int{1}), aegis.ErrUnavailable, "JetStream")
	})
	for _, err := range svc.DeadLetters(t.Context()) {
		fails(t, err, aegis.ErrUnavailable, "JetStream")
	}
	subscribe(t, svc, "order.*", into(&journal[int]{}))
	promptly(t, func() { fails(t, svc.Start(t.Context()), aegis.ErrUnavailable, "JetStream") })
}

func TestDeletedConsumerIsRecreated(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	js := manage(t, srv)
	svc, publisher := newService(t, srv, "risk"), newService(t, srv, "shop")
	var got journal[int]
	var healthy atomic.Bool
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
		if e.Data == 1 && !healthy.Load() {
			return errors.New("not yet")
		}
		got.add(e.Data)
		return nil
	}, aegis.Backoff(time.Hour, time.Hour))
	start(t, svc)
	publish(t, publisher, "order", "created", 1) // it fails and waits for its next attempt
	publish(t, publisher, "order", "created", 2)
	got.wait(t, 1)
	st, err := js.Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	for name := range st.ConsumerNames(t.Context()).Name() {
		if err := st.DeleteConsumer(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	healthy.Store(true)
	publish(t, publisher, "order", "created", 3) // there may be no consumer at this moment
	eventually(t, "all events are handled", func() bool { return slices.Contains(got.all(), 1) && slices.Contains(got.all(), 3) })

	// The same holds for a deleted stream, although the sequences of the new one start from 1 again.
	if err := js.DeleteStream(t.Context(), "AEGIS_EVENTS"); err != nil {
		t.Fatal(err)
	}
	publish(t, publisher, "order", "created", 4)
	eventually(t, "the event in the new stream is handled", func() bool { return slices.Contains(got.all(), 4) })
}

func TestConsumerCreatedByOperator(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	publish(t, svc, "other", "one", 0)
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.CreateConsumer(t.Context(), jetstream.ConsumerConfig{
		Durable: "risk~order~+", FilterSubject: "events.order.*", AckPolicy: jetstream.AckExplicitPolicy, AckWait: 7 * time.Second,
		MaxRequestBatch: 7, MaxRequestExpires: 200 * time.Millisecond, MaxDeliver: 3, MaxAckPending: 5,
	}); err != nil {
		t.Fatal(err)
	}
	var got journal[int]
	var healthy atomic.Bool
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
		if e.Data == 1 && !healthy.Load() {
			return errors.New("no")
		}
		got.add(e.Data)
		return nil
	}, aegis.Attempts(1))
	start(t, svc)
	if err := aegis.PublishBatch(t.Context(), svc, "order", "created", make([]int, 100)); err != nil {
		t.Fatal(err)
	}
	got.wait(t, 100)
	publish(t, svc, "order", "created", 1)
	var letters []aegis.DeadLetter
	eventually(t, "there is a dead letter", func() bool { letters = deadLetters(t, svc); return len(letters) == 1 })
	healthy.Store(true)
	if err := svc.Redrive(t.Context(), letters[0]); err != nil { // works only because the consumer's filter was extended
		t.Fatal(err)
	}
	got.wait(t, 101)

	consumer, err := st.Consumer(t.Context(), "risk~order~+")
	if err != nil {
		t.Fatal(err)
	}
	if c := consumer.CachedInfo().Config; c.AckWait != 7*time.Second || c.MaxDeliver != -1 || c.MaxRequestBatch != 0 || c.MaxAckPending < 1000 {
		t.Errorf("the operator's ack wait has to stay, and the rest to be aegis's: %+v", c)
	}
	for name, config := range map[string]jetstream.ConsumerConfig{
		"unacknowledged": {FilterSubject: "events.order.*", AckPolicy: jetstream.AckNonePolicy},
		"other":          {FilterSubject: "events.payment.*", AckPolicy: jetstream.AckExplicitPolicy},
	} {
		config.Durable = "risk~" + name
		if _, err := st.CreateConsumer(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		fails(t, aegis.Subscribe(svc, "order.*", into(&got), aegis.Durable(name)), aegis.ErrInvalid, "risk~"+name, "Durable")
	}
}

// A subscription handles as many events at once as Concurrency allows, even if only a single handler is free when events arrive.
func TestEventsUseFullConcurrency(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var running atomic.Int32
	release := make(chan struct{})
	subscribe(t, svc, "order.*", func(context.Context, aegis.Event[int]) error {
		running.Add(1)
		<-release
		return nil
	}, aegis.Concurrency(64))
	start(t, svc)
	for i := range 63 {
		publish(t, svc, "order", "created", i)
	}
	eventually(t, "63 handlers run", func() bool { return running.Load() == 63 })
	time.Sleep(1500 * time.Millisecond) // until the pull requests have expired
	if err := aegis.PublishBatch(t.Context(), svc, "order", "created", make([]int, 100)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "64 handlers run", func() bool { return running.Load() == 64 })
	close(release)
	eventually(t, "all events are handled", func() bool { return running.Load() == 163 })
}

func TestEventOfLongHandlerIsNotRedelivered(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var handled journal[int]
	instance := func() *aegis.Service {
		svc := newService(t, srv, "risk")
		subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[time.Duration]) error {
			handled.add(e.Attempt)
			time.Sleep(e.Data)
			return nil
		}, aegis.Concurrency(2))
		start(t, svc)
		return svc
	}
	if err := instance().Stop(t.Context()); err != nil { // this creates the consumer, so that an operator can change it
		t.Fatal(err)
	}
	shortenAckWait(t, srv, "AEGIS_EVENTS", time.Second)
	svc := instance()
	publish(t, svc, "order", "created", 4*time.Second)
	handled.wait(t, 1)
	instance()                                    // it would get the event if that were redelivered
	if err := svc.Stop(t.Context()); err != nil { // waits for the handler
		t.Fatal(err)
	}
	if got := handled.all(); !slices.Equal(got, []int{1}) {
		t.Errorf("got attempts %v", got)
	}
}

// A client that was disconnected for longer than registry entries live keeps the instances that it knew, and Discover is correct
// within a second after the reconnect.
func TestDiscoverAfterReconnect(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	reconnected := make(chan struct{}, 10)
	client := newService(t, srv, "shop", aegis.WithURL("nats://"+p.address), aegis.WithPool(1), aegis.WithNATS(
		nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }),
		nats.ReconnectHandler(func(*nats.Conn) { reconnected <- struct{}{} }),
	))
	add := func(id string) *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithID(id), aegis.WithHeartbeat(time.Second))
		start(t, s)
		return s
	}
	add("a")
	var reigns journal[reignOf]
	crashing := startLeader(t, srv, "Aggressive", &reigns)
	stopping := add("c")
	eventually(t, "Discover shows all instances", func() bool { return len(instances(t, client, "risk")) == 3 })
	p.hold(toServer, toClient)
	p.cut()
	if err := crashing.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := stopping.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	add("d")
	other := newService(t, srv, "ops")
	eventually(t, "the crashed instance has expired", func() bool { return len(instances(t, other, "risk")) == 2 })
	eventually(t, "the server has removed the watch of the disconnected client", func() bool {
		st, err := manage(t, srv).Stream(t.Context(), "KV_aegis_registry")
		return err == nil && st.CachedInfo().State.Consumers == 1 // the watch of other
	})
	if got := instances(t, client, "risk"); len(got) != 3 {
		t.Errorf("got %q while disconnected", got)
	}
	p.heal()
	<-reconnected
	begin := time.Now()
	eventually(t, "Discover shows who has come and gone", func() bool {
		got := instances(t, client, "risk")
		return len(got) == 3 && got[0] == "a ACTIVE" && got[1] == "d ACTIVE"
	})
	if took := time.Since(begin); took > time.Second {
		t.Errorf("it took %v", took)
	}
	// The crashed instance might just not have reconnected yet. It has three heartbeats to do so.
	eventually(t, "Discover does not show the crashed instance", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE", "d ACTIVE"}) })
	if took := time.Since(begin); took < 2*time.Second || took > 4500*time.Millisecond {
		t.Errorf("the crashed instance was gone after %v; want 2 to 4.5 s", took)
	}
}

// If JetStream doesn't answer, Discover waits until its ctx ends.
func TestDiscoverWithoutAnswer(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := nc.Subscribe("$JS.API.>", func(*nats.Msg) {}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	_, err = newService(t, srv, "shop").Discover(ctx, "risk")
	fails(t, err, aegis.ErrTimeout)
	if ctx.Err() == nil {
		t.Error("Discover did not wait until ctx ended")
	}
}

// Operations that the permissions deny are rarely repeated, because the client and the server log each denial.
func TestDeniedOperationsAreRarelyRepeated(t *testing.T) {
	t.Parallel()
	publish, subscribe := allowances(t, "it sends commands")
	srv := startServer(t, withJetStream(t), func(o *server.Options) {
		o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: append(publish, "rpc.>")},
			Subscribe: &server.SubjectPermission{Allow: subscribe},
		}}}
	})
	svc := newService(t, srv, "orders", aegis.WithNATS(nats.UserInfo("admin", "")))
	handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
	start(t, svc)
	var logged safeBuffer
	shop := newService(t, srv, "shop", aegis.WithNATS(nats.UserInfo("user", "")), aegis.WithLogger(slog.New(slog.NewTextHandler(&logged, nil))))
	denials := func() int { return strings.Count(logged.String(), "ermissions") }
	for range 100 {
		if _, err := aegis.SendCommand[int, int](t.Context(), shop, "orders", "work", 1); err != nil {
			t.Fatal(err)
		}
		_, err := call[int, int](shop, "orders", "missing", 1)
		fails(t, err, aegis.ErrUnavailable, "$SRV.INFO.orders")
	}
	if n := denials(); n > 2 { // one denial per connection
		t.Errorf("got %d denials for 200 requests", n)
	}
	_, err := shop.Discover(t.Context(), "orders")
	fails(t, err, aegis.ErrDenied)
	before := denials()
	time.Sleep(8 * time.Second)
	if n := denials() - before; n > 15 {
		t.Errorf("got %d denials in 8 s", n)
	}
}

func TestMalformedRegistryEntries(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var logged safeBuffer
	client := newService(t, srv, "shop", aegis.WithLogger(slog.New(slog.NewTextHandler(&logged, nil))))
	svc := newService(t, srv, "risk", aegis.WithID("a"))
	handle(t, svc, "m", echo)
	start(t, svc)
	kv, err := manage(t, srv).KeyValue(t.Context(), "aegis_registry")
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{
		"risk.x1": "garbage", "risk.x2": `{"service":"risk","id":"a"}`, "risk.x3": `[` + strings.Repeat("[", 20000), "risk.x4": `{"service":"other","id":"x4"}`,
		"risk.x5": `{"service":"risk","id":"x5","endpoints":{}}`,
	} {
		if _, err := kv.Put(t.Context(), key, []byte(value)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the entry is logged", func() bool {
			if got := instances(t, client, "risk"); !slices.Equal(got, []string{"a ACTIVE"}) {
				t.Fatal(got)
			}
			return strings.Contains(logged.String(), "key="+key)
		})
	}
	if _, err := call[string, string](client, "risk", "m", "", aegis.Balance(aegis.Random)); err != nil {
		t.Error(err)
	}
}

// limitAccount sets the quotas of the account that all tests use.
func limitAccount(tb testing.TB, srv *server.Server, limits server.JetStreamAccountLimits) {
	tb.Helper()
	if err := srv.GlobalAccount().UpdateJetStreamLimits(map[string]server.JetStreamAccountLimits{"": limits}); err != nil {
		tb.Fatal(err)
	}
}

// What a full account, a full stream or a quota refuses may be accepted later, so it is not the caller's fault.
func TestFullAccount(t *testing.T) {
	t.Parallel()
	unlimited := server.JetStreamAccountLimits{MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}
	full := unlimited
	full.MaxStore = 600_000
	for name, fill := range map[string]func(srv *server.Server) (relieve func()){
		"the account's storage": func(srv *server.Server) func() {
			limitAccount(t, srv, full)
			return func() { limitAccount(t, srv, unlimited) }
		},
		"the stream's bytes": func(srv *server.Server) func() {
			update := func(bytes int64) {
				for _, name := range []string{"AEGIS_EVENTS", "AEGIS_COMMANDS"} {
					st, err := manage(t, srv).Stream(t.Context(), name)
					if err != nil {
						t.Fatal(err)
					}
					config := st.CachedInfo().Config
					config.MaxBytes, config.Discard = bytes, jetstream.DiscardNew
					if _, err := manage(t, srv).UpdateStream(t.Context(), config); err != nil {
						t.Fatal(err)
					}
				}
			}
			update(600_000)
			return func() { update(-1) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			// Those that aegis makes schedule messages, and so can't discard new ones.
			for _, config := range []jetstream.StreamConfig{
				{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}},
				{Name: "AEGIS_COMMANDS", Subjects: []string{"commands.>"}, Retention: jetstream.WorkQueuePolicy},
			} {
				if _, err := manage(t, srv).CreateStream(t.Context(), config); err != nil {
					t.Fatal(err)
				}
			}
			svc := newService(t, srv, "risk")
			var got journal[string]
			subscribe(t, svc, "order.*", into(&got))
			handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (int, error) { return len(c.Data), nil })
			start(t, svc)
			publish(t, svc, "order", "created", "first")
			relieve := fill(srv)
			large := strings.Repeat("x", 100_000)
			refused := func(err error) {
				t.Helper()
				if e := fails(t, err, aegis.ErrUnavailable, "was refused"); !e.NotRun {
					t.Error("NotRun is not set")
				}
			}
			var err error
			stored := 1
			for ; err == nil && stored < 20; stored++ {
				err = aegis.Publish(t.Context(), svc, "order", "created", large)
			}
			refused(err)
			stored--
			refused(aegis.PublishBatch(t.Context(), svc, "order", "created", []string{large}))
			err = nil
			for i := 0; err == nil && i < 100; i++ {
				_, err = aegis.SendCommand[string, int](t.Context(), svc, "nobody", "work", large)
			}
			refused(err)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			patient := make(chan error, 1)
			go func() { patient <- aegis.Publish(ctx, svc, "order", "created", "last"+large, aegis.Sticky()) }()
			time.Sleep(300 * time.Millisecond)
			select {
			case err := <-patient:
				t.Fatalf("Publish with Sticky returned %v while the storage was full", err)
			default:
			}
			relieve()
			if err := <-patient; err != nil {
				t.Error(err)
			}
			if all := got.wait(t, stored+1); !strings.HasPrefix(all[len(all)-1], "last") {
				t.Errorf("got %.20q at last", all[len(all)-1])
			}
		})
	}
	t.Run("the number of consumers", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, withJetStream(t))
		limits := unlimited
		limits.MaxConsumers = 1
		limitAccount(t, srv, limits)
		svc := newService(t, srv, "risk")
		var got journal[int]
		subscribe(t, svc, "order.*", into(&got))
		subscribe(t, svc, "payment.*", into(&got))
		fails(t, svc.Start(t.Context()), aegis.ErrUnavailable, "maximum consumers limit")
	})
	t.Run("replicas without a cluster", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, withJetStream(t))
		fails(t, aegis.Publish(t.Context(), newService(t, srv, "risk", aegis.WithReplicas(3)), "order", "created", 1), aegis.ErrInvalid, "replicas")
	})
}

// If there is no stream, but somebody who does not use aegis subscribes to everything, the server does not report that there are no
// responders. The error says what may be wrong.
func TestNoStreamBehindPlainSubscriber(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	everything := rawConn(t, srv.ClientURL())
	if _, err := everything.SubscribeSync(">"); err != nil {
		t.Fatal(err)
	}
	if err := everything.Flush(); err != nil {
		t.Fatal(err)
	}
	s := newService(t, srv, "client", aegis.WithTimeout(300*time.Millisecond))
	fails(t, aegis.Publish(t.Context(), s, "price", "changed", 1), aegis.ErrTimeout, "perhaps no stream takes it")
	fails(t, aegis.PublishBatch(t.Context(), s, "price", "changed", []int{1}), aegis.ErrTimeout, "perhaps no stream takes it")
	_, err := aegis.SendCommand[int, int](t.Context(), s, "svc", "do", 1)
	fails(t, err, aegis.ErrTimeout, "perhaps no stream takes it")
}
